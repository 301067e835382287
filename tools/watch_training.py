"""Show a training run's progress from its log: percent, losses, tokens per second, time left; draw its curves."""

import start

if __name__ == "__main__":
    start.run("watch_training")
