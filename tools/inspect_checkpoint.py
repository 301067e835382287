"""Show what decided the run of a checkpoint, compare two, verify the files."""

import start

if __name__ == "__main__":
    start.run("inspect_checkpoint")
