"""`run_many.py`, noting in HASH_LOG which rank hashes which file of a checkpoint, and in which of its processes."""

import multiprocessing
import os

from megatron_meap.backend import device
from tests import run_many

device.prepare()

from megatron.core.dist_checkpointing import validation  # noqa: E402

_hash = validation._compute_file_hash


def noted(path: str) -> str:
    with open(os.environ["HASH_LOG"], "a") as log:
        process = "saver" if multiprocessing.current_process().daemon else "trainer"
        log.write(f"{os.environ['RANK']} {process} {path}\n")
    return _hash(path)


validation._compute_file_hash = noted

if __name__ == "__main__":
    run_many.main()
