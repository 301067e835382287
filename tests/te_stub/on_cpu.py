"""Transformer Engine's own Python on a CPU: its compiled extension is `transformer_engine_torch.py` of this folder.

The Python is the wheel `transformer_engine` of PyPI (1.2 MB). It belongs beside the environment's packages, not among
them, where it would look like a Transformer Engine that works; `make` puts it there:

    pip install --no-deps --target .venv/te-python transformer_engine==2.20.2
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
SITE = Path(os.environ.get("TE_PYTHON", HERE.parent.parent / ".venv" / "te-python"))

_TE = "transformer_engine.pytorch."
_DPA = f"{_TE}attention.dot_product_attention."
_ON_GPU = "query_layer.is_cuda and key_layer.is_cuda and value_layer.is_cuda"
EDITS = {
    f"{_DPA}backends": (_ON_GPU, "True"),
    f"{_DPA}dot_product_attention": (_ON_GPU, "True"),
    f"{_TE}module.base": ("if not inp.is_cuda:", "if False:"),
    f"{_TE}module.linear": ('if weight is None or weight.device.type != "cuda":', "if weight is None:"),
}
"""Its refusals of tensors that are not on a GPU."""


class _Edited(importlib.machinery.SourceFileLoader):
    """Compiles a module without its refusals."""

    def get_code(self, name: str) -> types.CodeType:
        path = self.get_filename(name)
        old, new = EDITS[name]
        source = self.get_data(path).decode()
        assert old in source, f"{name}: Transformer Engine has another source than this stub was written for"
        return compile(source.replace(old, new), path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name not in EDITS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Edited(name, spec.origin)
        return spec


def install() -> None:
    """Make `transformer_engine` importable and usable; call it before `device.prepare`."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it does not look for its compiled library
    sys.path[:0] = [str(HERE)]
    sys.path.append(str(SITE))
    sys.meta_path.insert(0, _Finder())
    import torch
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda name: None
    sys.modules[f"{_TE}onnx_extensions"] = mock.MagicMock()
    sys.modules["einops"] = mock.MagicMock(__spec__=None)  # only inference needs it
    import transformer_engine.pytorch

    del sys.modules["einops"]
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine"):
            for question, answer in (("get_device_compute_capability", (9, 0)), ("get_cudnn_version", (9, 20, 0))):
                if hasattr(module, question):
                    setattr(module, question, lambda answer=answer: answer)
    tensor = torch.tensor  # pinned memory needs a driver
    torch.tensor = lambda *args, pin_memory=False, **kwargs: tensor(*args, **kwargs)


def let_megatron_use_it() -> None:
    """Call it after `device.prepare`: nothing that needs Transformer Engine is refused or replaced."""
    from megatron_meap.backend import cpu, cpu_patches
    from megatron_meap.trainer import arguments

    cpu.unsupported = lambda args: []
    cpu_patches.install = lambda: None
    layers = arguments.LOCAL_LAYERS | arguments.NOT_COMPILED

    def defaults(*_: object) -> dict[str, object]:
        local = "local" in sys.argv
        return {"distributed_backend": "gloo", "use_cpu_initialization": True} | (layers if local else {})

    arguments._local_defaults = defaults
