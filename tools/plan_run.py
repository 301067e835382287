"""Plan a run before it is queued: parameters, memory of every rank, FLOPs, time and cost. No GPU is needed."""

import start

if __name__ == "__main__":
    start.run("plan_run")
