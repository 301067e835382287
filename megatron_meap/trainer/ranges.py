"""Numbers that no run can use and that Megatron does not check, or only in the middle of a run."""

import math
from argparse import Namespace
from fnmatch import fnmatchcase

from megatron_meap.errors import UsageError

_AT_LEAST: dict[str, float] = {
    "*_interval": 1,
    "adam_eps": 0,
    "clip_grad": 0,
}
"""Patterns of arguments, and the least that one can be."""

_BELOW_ONE = ("adam_beta?", "lion_beta?", "muon_momentum", "sgd_momentum")
"""Of arguments that must be at least 0 and below 1."""


def check(given: dict[str, str], args: Namespace) -> None:
    """Refuse what is no number or outside its range.

    Args:
        given: the arguments that differ from their defaults, and their flags (`without_effect.changed`).
        args: parsed.

    Raises:
        UsageError: names the flag.
    """
    for name, flag in given.items():
        value = getattr(args, name, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise UsageError(f"{flag} {value}: must be a finite number")
        least = next((least for pattern, least in _AT_LEAST.items() if fnmatchcase(name, pattern)), None)
        if least is not None and value < least:
            raise UsageError(f"{flag} {value}: must be at least {least}")
        if any(fnmatchcase(name, pattern) for pattern in _BELOW_ONE) and not 0 <= value < 1:
            raise UsageError(f"{flag} {value}: must be at least 0 and below 1")
