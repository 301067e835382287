"""`--enable-ft-package` where NVRx cannot work is refused before the start. (NVRx itself was never run here.)"""

import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_meap.cluster import hangs
from megatron_meap.errors import UsageError


class Old:
    def init_workload_monitoring(self) -> None: ...


class New:
    def init_workload_monitoring(self, num_warmup_iters: int = 5) -> None: ...


@pytest.mark.parametrize(
    ("client", "changes", "socket", "message"),
    [
        (New, {"save": None}, True, "--enable-ft-package: keeps its times in --save"),
        (None, {}, True, r"needs NVRx \(pip install nvidia-resiliency-ext\)"),
        (Old, {}, True, "too old for megatron-core 0.19"),
        (New, {}, False, "needs ft_launcher instead of torchrun"),
        (New, {}, True, None),
        (New, {"dry_run": True}, False, None),
        (None, {"enable_ft_package": False}, False, None),
    ],
)
def test_what_nvrx_needs_is_checked(
    client: type | None, changes: dict, socket: bool, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = None if client is None else SimpleNamespace(RankMonitorClient=client)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", SimpleNamespace(fault_tolerance=found))
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.fault_tolerance", found)
    if socket:
        monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "/tmp/socket")
    none = dict.fromkeys(("fault_injector_ranks", "fault_injector_num_ranks"))
    args = Namespace(**{"enable_ft_package": True, "save": "x", "dry_run": False} | none | changes)
    if message is None:
        hangs.check(args)
    else:
        with pytest.raises(UsageError, match=message):
            hangs.check(args)
