"""Show what the model really sees: decoded samples with the noised tokens marked, mask statistics, a stream digest."""

import start

if __name__ == "__main__":
    start.run("inspect_batches")
