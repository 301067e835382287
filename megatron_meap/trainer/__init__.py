"""Megatron's trainer with MEAP in it: flags, batches, the checks before the start, the run, the retrieval probe."""
