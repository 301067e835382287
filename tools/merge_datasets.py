"""Merge datasets into one, their documents one after the other."""

import start

if __name__ == "__main__":
    start.run("merge_datasets")
