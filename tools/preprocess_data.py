"""Turn text into a Megatron dataset (`.bin` and `.idx`), with a manifest beside it."""

import start

if __name__ == "__main__":
    start.run("preprocess_data")
