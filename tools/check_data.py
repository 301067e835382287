"""Verify a dataset against its manifest, and print what is in it."""

import start

if __name__ == "__main__":
    start.run("check_data")
