"""How the quantities and lines of the log are called that this project adds to Megatron's."""

TOKENS, RANK_TOKENS = "tokens/s", "tokens/s/rank"
TFLOPS, MFU = "model TFLOP/s/rank", "MFU (%)"
EMBEDDING_NORM = "embedding norm"
SPIKE, SKIPPED = "loss spike", "skipped step"
"""Lines of their own, by how they begin."""

WANDB_ID = "wandb_run_id"
"""File in the directory given to `--save`: the id of the W&B run that its training is logged to."""
