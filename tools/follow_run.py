"""Evaluate every checkpoint of a run as it is saved: one table and one picture over the tokens of its training."""

import start

if __name__ == "__main__":
    start.run("follow_run")
