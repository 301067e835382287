"""What `tests/warm.py` has imported before it forks: with the device, threads and paths of every test's environment."""

import gc
import os

from tests.launch import environment

os.environ.update(environment())

from megatron_meap.backend import device

device.prepare()

import lm_eval  # noqa: E402, F401
import transformers  # noqa: E402, F401
from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText  # noqa: E402, F401

import megatron_meap.evaluation.run  # noqa: E402
import megatron_meap.inspection.dry_run  # noqa: E402, F401

gc.freeze()  # no program forked from here looks through all this for garbage
