"""Check that this node has its GPUs and reaches the other nodes of a job; run on all of them at the same time."""

from megatron_meap.commands.check_nodes import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
