"""`pretrain_gpt_meap.py` unchanged, with marks around the functions of Megatron and of ours that are measured."""

import functools
import importlib.abc
import importlib.machinery
import os
import resource
import sys
from collections.abc import Callable
from typing import Any


def pretrain(mark: Callable[[Any], None]) -> None:
    """Run the program with this process's command line.

    Args:
        mark: called with the module `megatron_meap.trainer.run` as soon as that and Megatron are imported.
    """
    sys.meta_path.insert(0, _Finder(mark))
    from megatron_meap.errors import run
    from megatron_meap.pretrain import main

    run(main)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mark: Callable[[Any], None]) -> None:
        self.mark = mark

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The module of that name, to be marked once it is loaded."""
        if name != "megatron_meap.trainer.run":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module  # type: ignore[union-attr]

        def load_and_mark(module: Any) -> None:
            load(module)
            self.mark(module)

        spec.loader.exec_module = load_and_mark  # type: ignore[union-attr, method-assign]
        return spec


def around(owner: Any, name: str, before: Callable[[], object], after: Callable[[], object]) -> None:
    """Have one function called before each call of a function, and another one after it."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        before()
        result = function(*args, **kwargs)
        after()
        return result

    setattr(owner, name, marked)


def is_first_rank() -> bool:
    """Whether this process is rank 0."""
    return os.environ.get("RANK", "0") == "0"


def peak_memory() -> float:
    """Peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
