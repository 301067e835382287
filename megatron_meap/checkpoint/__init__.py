"""Checkpoints on disk: which one a run starts from, which are kept, and reading one without a trainer."""
