"""Looking at a run: its samples, its stream's digest, a dry run, its log."""
