"""Measure where models attend: on masked positions, over the others, and on the answer in a prompt."""

import start

if __name__ == "__main__":
    start.run("analyze_attention")
