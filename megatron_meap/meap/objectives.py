"""Published objectives by name: each sets several flags, and flags that are given take precedence."""

from types import MappingProxyType
from typing import Any, NamedTuple


class Objective(NamedTuple):
    """A published kind of input noise."""

    source: str
    """Where it was published."""

    settings: MappingProxyType[str, Any]
    """Fields of `MaskSettings` and their values."""


def _objective(source: str, **settings: Any) -> Objective:
    return Objective(source, MappingProxyType(settings))


OBJECTIVES = MappingProxyType(
    {
        "meap": _objective("arXiv 2502.07490"),
        "ntp": _objective("next-token prediction", mask_ratio=0.0),
        "mir": _objective(
            "arXiv 2606.06888", mask_strategy="bernoulli", mask_ratio_min=0.0, mask_ratio=0.5, copy_weight=0.4
        ),
        "replace": _objective("arXiv 2606.16246", mask_ratio=0.05, random_share=1.0),
        "predictable": _objective("arXiv 2512.23422", mask_strategy="weighted", mask_warmup_shape="sigmoid"),
        "mixed": _objective("arXiv 2512.14549", noised_share=0.5),
        "spans": _objective("spans of geometric length", mask_strategy="geometric"),
        "bert": _objective("arXiv 1810.04805", random_share=0.1, kept_share=0.1),
    }
)
