"""Show a training run's progress from its log: percent, losses, tokens per second, time left; draw its curves."""

from megatron_meap.commands.watch_training import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
