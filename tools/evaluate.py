"""Evaluate models on retrieval, long context and commonsense, side by side, with lm-evaluation-harness."""

import start

if __name__ == "__main__":
    start.run("evaluate")
