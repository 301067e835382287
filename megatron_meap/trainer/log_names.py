"""Names of the quantities and lines that this project adds to Megatron's log."""

TOKENS, RANK_TOKENS = "tokens/s", "tokens/s/rank"
TFLOPS, MFU = "model TFLOP/s/rank", "MFU (%)"
EMBEDDING_NORM = "embedding norm"
SPIKE, SKIPPED = "loss spike", "skipped step"
"""Beginnings of separate lines."""

WANDB_ID = "wandb_run_id"
"""File in the directory given to `--save` with the id of the W&B run to which its training is logged."""
