"""Loaded by pytest before all else (`make te`): the CPU adaptation hides Transformer Engine that is not there yet."""

import torch  # noqa: F401  # first: it loads the libraries that Transformer Engine needs
import transformer_engine.pytorch  # noqa: F401
