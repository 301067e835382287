"""Check that this node has its GPUs and reaches the other nodes of a job; run on all of them at the same time."""

import start

if __name__ == "__main__":
    start.run("check_nodes")
