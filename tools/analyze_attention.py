"""Measure where models attend: on masked positions, over the others, and on the answer in a prompt."""

from megatron_meap.commands.analyze_attention import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
