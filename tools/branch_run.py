"""Branch a run with a constant learning rate into one that decays (WSD)."""

import start

if __name__ == "__main__":
    start.run("branch_run")
