"""`--enable-ft-package`: hangs are detected by NVIDIA's Resiliency Extension (NVRx), if it can work."""

import importlib.util
import inspect
import os
from argparse import Namespace

from megatron_meap.errors import UsageError

FLAG = "--enable-ft-package"
_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"  # through which a rank finds the monitor of NVRx's launcher


def check(args: Namespace) -> None:
    """Refuse what would make Megatron fail after it has started.

    Raises:
        UsageError: NVRx is missing or too old, the run was not started by its launcher, or has no `--save`.
    """
    injects = args.fault_injector_ranks is not None or args.fault_injector_num_ranks is not None
    if injects and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        raise UsageError("--fault-injector-*: needs NVRx (pip install nvidia-resiliency-ext), or drop them")
    if not args.enable_ft_package:
        return
    if args.save is None:
        raise UsageError(f"{FLAG}: keeps its times in --save; name one")
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient
    except ImportError as error:
        raise UsageError(f"{FLAG}: needs NVRx (pip install nvidia-resiliency-ext), or drop the flag") from error
    if "num_warmup_iters" not in inspect.signature(RankMonitorClient.init_workload_monitoring).parameters:
        raise UsageError(f"{FLAG}: this nvidia-resiliency-ext is too old for megatron-core 0.19; install a newer one")
    if _SOCKET not in os.environ and not args.dry_run:
        raise UsageError(f"{FLAG}: needs ft_launcher instead of torchrun; NVRx comes with it")
