"""The CPU presented to Megatron as its accelerator, so that Megatron's own trainer runs under gloo without a GPU.

Megatron asks `torch.cuda` for devices, streams, random states and memory figures, and writes `device="cuda"` in many
places. `install` answers those questions for the CPU: same trainer, same flags, same checkpoints as on a GPU.
It is written for megatron-core 0.19 and must run before Megatron is imported. On a GPU this module is never imported.
"""

import contextlib
import functools
import os
import sys
import time
import types
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_meap.backend import deferred, native
from megatron_meap.backend.patching import replace
from megatron_meap.errors import UsageError

WRITTEN_FOR = "0.19."
CPU = torch.device("cpu")

# Functions that Megatron calls with device="cuda" or torch.device("cuda").
_FACTORIES = [
    "arange",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
    "empty_like",
    "full_like",
    "ones_like",
    "rand_like",
    "randn_like",
    "zeros_like",
]
_TENSOR_TYPES = ("FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor", "ByteTensor")


def install() -> None:
    """Put the CPU in the accelerator's place; a second call has no effect."""
    if getattr(torch.cuda, "meap_cpu_adaptation", False):
        return
    version = metadata.version("megatron-core")
    if not version.startswith(WRITTEN_FOR):
        raise UsageError(
            f"megatron-core {version}: training on a CPU supports {WRITTEN_FOR}x; "
            "install that version (pip install 'megatron-core[training]~=0.19.2') or train on a GPU"
        )
    _hide_transformer_engine()
    _use_threads()
    _answer_for_the_device()
    _redirect_cuda_placement()
    _present_cpu_types_as_cuda()
    _switch_off_what_needs_an_accelerator()
    torch.cuda.meap_cpu_adaptation = True  # type: ignore[attr-defined]


def describe() -> str:
    """One line for the user: that the run is on CPU, with how many threads, in which arithmetic at best."""
    kind = "bf16 matrix units" if has_bf16_units() else "no bf16 matrix units: 32-bit floats"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (
        f"no CUDA device: training on CPU, {ranks} process{'es' if ranks > 1 else ''} x "
        f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}, {kind}, {native.state()}"
    )


@functools.cache
def has_bf16_units() -> bool:
    """Whether the processor multiplies bf16 matrices natively (AVX512_BF16 or AMX), so that bf16 is faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _hide_transformer_engine() -> None:
    """Hide it: Megatron uses its fused optimizer wherever it is installed, but that has only CUDA kernels.

    If it has been imported before, only to build a model, it stays.
    """
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]  # an import of it fails now


def _use_threads() -> None:
    """Share the cores among the local ranks: torchrun's OMP_NUM_THREADS=1 is meant for GPU jobs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("MEAP_CPU_THREADS") or str(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if not threads.isdigit() or int(threads) < 1:
        raise UsageError(f"MEAP_CPU_THREADS={threads}: expected a number of threads, at least 1")
    torch.set_num_threads(int(threads))


class _Stream:
    """A stream without pending work: on a CPU every operation is finished when it returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0
        self.device = CPU

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        """Nothing is pending."""

    wait_stream = wait_event = lambda self, *_, **__: None

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        """An event that has happened."""
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        """Everything has finished."""
        return True


class _Event:
    """An event that has happened as soon as it is recorded, with the wall clock as its time."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded_at = 0.0

    def record(self, *_: Any) -> None:
        """Note the time."""
        self.recorded_at = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        """Milliseconds from this event to `end`."""
        return 1000.0 * (end.recorded_at - self.recorded_at)

    def synchronize(self) -> None:
        """Nothing is pending."""

    wait = lambda self, *_, **__: None  # noqa: E731

    def query(self) -> bool:
        """It has happened."""
        return True


def _answer_for_the_device() -> None:
    """Let `torch.cuda` answer Megatron: one device, no memory of its own, streams that never wait."""

    def returning(value: Any) -> Callable:  # one function object a name: torch.compile keeps a table of them
        return lambda *_, **__: value

    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = types.SimpleNamespace(
        name="CPU", major=0, minor=0, total_memory=memory, multi_processor_count=torch.get_num_threads()
    )
    stats: dict[str, int] = _Zeros()
    answers: dict[str, Any] = {
        "is_available": lambda: True,  # required by initialize_megatron
        "device_count": lambda: 1,  # without one, no model-parallel groups are created
        "current_device": lambda: CPU,  # used as device=...
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (0, 0),  # so that no kernel for a GPU is chosen
        "get_device_name": lambda *_: "CPU",
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "default_generators": {CPU: torch.default_generator},
        "_lazy_call": lambda callback, **_: callback(),
        "memory_stats": lambda *_: stats,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": lambda *_: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (memory, memory),
    }
    for name in [
        "set_device",
        "synchronize",
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
        "manual_seed_all",
    ]:
        answers[name] = returning(None)
    for name in ["memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"]:
        answers[name] = returning(0)
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = get_rng_state  # type: ignore[assignment]
    torch.cuda.nvtx.range_push = returning(None)
    torch.cuda.nvtx.range_pop = returning(None)


class _Zeros(dict[str, int]):
    """Memory statistics of a device that has no memory of its own."""

    def __missing__(self, key: str) -> int:
        return 0


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _redirect_cuda_placement() -> None:
    """Make `device="cuda"`, `.cuda()` and `.to("cuda")` mean the CPU."""

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> torch.Tensor:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return create

    # `with torch.device("meta")` knows the factories by identity: it must note the originals before they are wrapped.
    # Without this, transformers' from_pretrained leaves its rotary frequencies uninitialised.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))

    original_to: Callable[..., torch.Tensor] = torch.Tensor.to

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original_to(self, *[CPU if _names_cuda(argument) else argument for argument in args], **kwargs)

    torch.Tensor.to = tensor_to  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]


def _present_cpu_types_as_cuda() -> None:
    """Let Megatron's checks of tensor types (optimizer, gradient clipping, Float16Module) accept CPU tensors."""
    for name in _TENSOR_TYPES:
        setattr(torch.cuda, name, getattr(torch, name))
    original_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = tensor_type  # type: ignore[method-assign, assignment]


def _switch_off_what_needs_an_accelerator() -> None:
    """Switch off compilation, pinned memory and the warnings about them."""

    torch.compile = deferred.not_compiled  # type: ignore[assignment]
    deferred.do_without_compiler()
    torch.accelerator.is_available = lambda: False  # DataLoader asks before it pins memory
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def adapt_megatron() -> None:
    """Patch what matters only on a CPU inside Megatron (0.19), once it can be imported.

    `tests/unit/test_megatron_patches.py` shows why each is needed.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.training import initialize

    def as_asked(tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    # The original turns a tensor into an array only when it copies it from a GPU.
    replace(token_dispatcher, "maybe_move_tensor_to_cpu", lambda _: as_asked)
    # It compiles nothing here, but draws its inputs from the generator from which the weights are drawn next.
    replace(initialize, "_warmup_jit_function", lambda _: lambda tp_size=None: None)
    PersistentAsyncCaller.async_loop = staticmethod(_checkpoint_worker)


def _checkpoint_worker(*args: Any) -> None:
    """The process in which Megatron saves in the background: a new one, where the CPU takes the device's place anew."""
    install()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args)


def unsupported(args: Any) -> list[tuple[str, str]]:
    """Flags for something that a CPU does not have: pairs of the flag and the reason."""
    te = "it needs Transformer Engine's CUDA kernels"
    asked = [
        ("--fp8-format", args.fp8 is not None, te),
        ("--fp4-format", args.fp4 is not None, te),
        ("--context-parallel-size", args.context_parallel_size > 1, te),
        ("--transformer-impl", args.transformer_impl != "local", te),
        ("--moe-grouped-gemm", args.moe_grouped_gemm, "it needs CUTLASS kernels"),
        ("--cuda-graph-impl", args.cuda_graph_impl != "none", "there are no CUDA graphs"),
        ("--enable-cuda-graph", args.enable_cuda_graph, "there are no CUDA graphs"),
        ("--external-cuda-graph", args.external_cuda_graph, "there are no CUDA graphs"),
        ("--distributed-backend", args.distributed_backend != "gloo", "only gloo communicates between CPU processes"),
        (
            "--pipeline-model-parallel-comm-backend",
            args.pipeline_model_parallel_comm_backend is not None,
            "only gloo communicates between CPU processes",
        ),
        ("--tp-comm-overlap", args.tp_comm_overlap, te),
        ("--moe-router-fusion", args.moe_router_fusion, te),
        ("--save-activations-interval", args.save_activations_interval is not None, te),
        ("--save-dgrads-interval", args.save_dgrads_interval is not None, te),
        (
            f"--overlap-param-gather with --optimizer {args.optimizer}",
            args.overlap_param_gather and args.optimizer not in ("adam", "sgd"),
            "gloo gathers tensors of one size only",
        ),
        ("--gpu-sniff-test-interval", args.gpu_sniff_test_interval is not None, "its products would take minutes"),
        (
            "--profile without --use-pytorch-profiler",
            args.profile and not args.use_pytorch_profiler,
            "it is for NVIDIA's Nsight",
        ),
        *(
            (f"--{name.replace('_', '-')}", getattr(args, name), "it queries NVIDIA's driver")
            for name in ("log_straggler", "log_device_memory_used", "log_energy", "record_memory_history")
        ),
        ("--flight-recorder-dump-path", args.flight_recorder_dump_path, "it records NCCL's operations"),
        ("--async-strategy nvrx", args.async_strategy == "nvrx", "its process that saves counts GPUs"),
        ("--use-megatron-fsdp", args.use_megatron_fsdp, "its buffers and streams are CUDA's"),
        ("--use-torch-fsdp2", args.use_torch_fsdp2, "it asks for the index of a CUDA device"),
        ("--use-nccl-ub", args.nccl_ub, "only gloo communicates between CPU processes"),
        ("--fp16", args.fp16, "half precision is not supported there; use --bf16 or --fp32"),
    ]
    return [(flag, reason) for flag, is_asked, reason in asked if is_asked]
