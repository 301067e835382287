"""Settings of the paper's official code for which Megatron has no flags.

- Initialisation: weights N(0, sqrt(2 / 5d)), output projections (of attention and MLP) N(0, 1 / (sqrt(d) L)), for
  hidden size d and L layers. `--init-method-std` gives the first, but ties the second to it: std / sqrt(2L).
- Weight decay of all parameters. Megatron exempts biases and norms, without a flag for it.
"""

import math
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.nn.init import normal_

from megatron_meap.errors import UsageError
from megatron_meap.flags import Settings, flag


@dataclass(frozen=True)
class OfficialSettings(Settings):
    """The two things of the official code that Megatron has no flags for."""

    official_init: bool = flag(
        False,
        "initialise as the official code does: weights N(0, sqrt(2 / 5d)), output projections N(0, 1 / (sqrt(d) L)), "
        "for hidden size d and L layers",
    )
    decay_all_parameters: bool = flag(
        False,
        "weight decay also for norms and biases, as in the official code (default: Megatron exempts them)",
        decides=True,
    )

    def check(self, args: Namespace) -> None:
        """Refuse two kinds of initialisation at once."""
        if self.official_init and args.use_mup:
            raise UsageError("--meap-official-init: contradicts --use-mup, which has its own initialisation")


def initialise(config: Any, args: Namespace) -> None:
    """Set the initialisation in Megatron's `TransformerConfig`, if it is asked for."""
    if not getattr(args, "meap_official_init", False):  # a checkpoint's arguments may be older than the flag
        return
    hidden = config.hidden_size
    config.init_method = config.embedding_init_method = partial(normal_, mean=0.0, std=math.sqrt(2 / (5 * hidden)))
    config.output_layer_init_method = partial(normal_, mean=0.0, std=1 / (math.sqrt(hidden) * config.num_layers))
