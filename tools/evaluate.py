"""Evaluate models on retrieval, long context and commonsense, side by side, with lm-evaluation-harness."""

from megatron_meap.commands.evaluate import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
