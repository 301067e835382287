"""Plan a run before it is queued: parameters, memory of every rank, FLOPs, time and cost. No GPU is needed."""

from megatron_meap.commands.plan_run import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
