"""Packages that Megatron and PyTorch import if they are installed, although most runs never need them.

transformers is for Hugging Face tokenizers, Weights & Biases for its own log, PyTorch's compiler for a GPU. Together
they took a third of the time from the command to the first step (`benchmarks/startup.py`); now each is imported when it
is used.
"""

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_PACKAGES = ("transformers", "transformers.utils", "transformers.utils.chat_template_utils", "wandb")
_IMPORTERS = ("megatron.core.timers", "megatron.core.tokenizers.text.libraries")
_COMPILER = "torch._dynamo"


def import_megatron() -> None:
    """Import the parts of Megatron that import these packages, without them; those already imported stay."""
    there = {top for top in map(_top, _PACKAGES) if top not in sys.modules and importlib.util.find_spec(top)}
    with _standing_in([name for name in _PACKAGES if _top(name) in there]):
        for name in _IMPORTERS:
            importlib.import_module(name)


def do_without_compiler() -> None:
    """Replace PyTorch's compiler, which its optimizers import only to tell it what not to compile."""
    if _COMPILER not in sys.modules:
        rules = types.SimpleNamespace(clear_lru_cache=lambda: None)
        answers = {"graph_break": lambda: None, "disable": not_compiled, "trace_rules": rules}
        sys.modules[_COMPILER] = torch._dynamo = _Later(_COMPILER, answers)  # type: ignore[assignment]


def not_compiled(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
    """`torch.compile` and its decorators, if nothing is compiled."""
    return function if function is not None else (lambda decorated: decorated)


def _top(name: str) -> str:
    return name.partition(".")[0]


@contextlib.contextmanager
def _standing_in(names: list[str]) -> Iterator[None]:
    """Let `from NAME import x` in Megatron return something that imports it later."""
    modules = {name: _Later(name) for name in names}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _Later(types.ModuleType):
    """Stands in for a module, and imports it if anything other than the given answers is used."""

    def __init__(self, name: str, answers: dict[str, Any] | None = None) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)  # by which others see that it is installed
        self.__dict__.update(answers or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # code that inspects all modules does not use this one
            raise AttributeError(name)
        if self.__name__ in _PACKAGES and sys.modules.get(self.__name__) is self and _asked_by_megatron():
            return _Name(self, name)
        return getattr(self.module(), name)

    def module(self) -> types.ModuleType:
        """The module itself."""
        if sys.modules.get(self.__name__) is self:
            for name, module in list(sys.modules.items()):
                if isinstance(module, _Later) and _top(name) == _top(self.__name__):
                    del sys.modules[name]
            if vars(torch).get("_dynamo") is self:
                del torch._dynamo
        return importlib.import_module(self.__name__)

    def __eq__(self, other: object) -> bool:  # Megatron's timers ask whether a writer is this module
        return other is self or other is sys.modules.get(self.__name__)

    __hash__ = types.ModuleType.__hash__


def _asked_by_megatron() -> bool:
    """Whether a stand-in is used by a module of Megatron's; others get the package itself."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame and _top(frame.f_globals.get("__name__", "")) in ("importlib", "_frozen_importlib"):
        frame = frame.f_back
    return frame is not None and _top(frame.f_globals.get("__name__", "")) == "megatron"


class _Name:
    """Stands in for an attribute of a stand-in for a module."""

    def __init__(self, module: _Later, name: str) -> None:
        self._module, self._name = module, name

    def _itself(self) -> Any:
        return getattr(self._module.module(), self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._itself(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._itself()(*args, **kwargs)
