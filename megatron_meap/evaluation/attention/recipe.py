"""How the inputs of an attention analysis are made: flags of `tools/analyze_attention.py`."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_meap.errors import refuse
from megatron_meap.flags import Settings, flag


@dataclass(frozen=True)
class Recipe(Settings):
    """Samples, and as many prompts; over these the depth of the needle goes from 0 to 100%."""

    PREFIX: ClassVar[str] = ""

    length: int | None = flag(None, "sample length (default: context, at most 4096)", metavar="TOKENS")
    samples: int = flag(20, "number of samples, and of prompts (default: %(default)s)")
    mask_ratio: float = flag(0.15, "default: %(default)s", metavar="P")
    seed: int = flag(1234, "for masks and prompts (default: %(default)s)")
    needle: str = flag(
        " The secret number of {key} is {value}. ", "sentence to hide, with {key} and {value}", metavar="TEXT"
    )
    question: str = flag(
        " The secret number of {key} is", "end of a prompt, with {key}; the value would come next", metavar="TEXT"
    )

    def __post_init__(self) -> None:
        """Refuse what makes no inputs."""
        refuse(
            (self.samples < 1, f"--samples {self.samples}: must be at least 1"),
            (not 0 < self.mask_ratio < 1, f"--mask-ratio {self.mask_ratio}: must lie between 0 and 1"),
            (not 0 <= self.seed < 2**64, f"--seed {self.seed}: must lie between 0 and 2**64 - 1"),
            ("{key}" not in self.needle or "{value}" not in self.needle, "--needle: must contain {key} and {value}"),
            ("{key}" not in self.question, "--question: must contain {key}"),
        )
