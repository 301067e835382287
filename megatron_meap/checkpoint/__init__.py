"""Checkpoints outside the trainer: reading them, and converting them from and to Hugging Face directories."""
