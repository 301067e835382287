"""How functions of Megatron are replaced: once, keeping the original, and only for calls that the replacement knows."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any


def original_of(owner: Any, name: str) -> Any:
    """Megatron's original attribute, whether it has been replaced or not."""
    current = getattr(owner, name)
    return getattr(current, "meap_original", current)


def replace(owner: Any, name: str, make: Callable[[Any], Callable]) -> None:
    """Replace an attribute by the function `make(original)`; a second call replaces the first replacement."""
    original = original_of(owner, name)
    replacement = functools.wraps(original)(make(original))
    replacement.meap_original = original  # type: ignore[attr-defined]
    setattr(owner, name, replacement)


@contextlib.contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute within the block."""
    current = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, current)


def where_possible(fast: Callable) -> Callable[[Callable], Callable]:
    """For `replace`: calls go to `fast` if they only use parameters that it has, otherwise to the original.

    Parameters that `fast` lacks count as unused if they have the original's defaults. So a call that uses a parameter
    added by a later Megatron reaches the original.
    """

    def make(original: Callable) -> Callable:
        signature = inspect.signature(original)
        known = inspect.signature(fast).parameters.keys()
        if missing := known - signature.parameters.keys():
            raise TypeError(f"{original.__qualname__} has no parameter {', '.join(sorted(missing))}")
        defaults = {name: each.default for name, each in signature.parameters.items() if name not in known}

        @functools.wraps(original)
        def choose(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            if any(name in given and given[name] != default for name, default in defaults.items()):
                return original(*args, **kwargs)
            return fast(**{name: value for name, value in given.items() if name in known})

        return choose

    return make
