"""Gather real text from this machine (Python's documentation, docstrings and library sources) as JSON Lines."""

import start

if __name__ == "__main__":
    start.run("build_corpus")
