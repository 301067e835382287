"""`tests/run_many.py` with Transformer Engine's Python over the stub; says at the end what of the stub was called."""

import os
import sys

from tests.te_stub import on_cpu

on_cpu.install()

from tests import run_many  # noqa: E402  # device.prepare

on_cpu.let_megatron_use_it()

if __name__ == "__main__":
    run_many.main()
    if os.environ["RANK"] == "0":
        print(f"stub calls: {dict(sys.modules['transformer_engine_torch'].CALLS)}", flush=True)
