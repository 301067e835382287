"""Show what the model really sees: decoded samples with the noised tokens marked, mask statistics, a stream digest."""

from megatron_meap.commands.inspect_batches import main
from megatron_meap.errors import run

if __name__ == "__main__":
    run(main)
