"""The tasks as lm-evaluation-harness runs them: YAML beside the Python that makes and scores their samples."""
