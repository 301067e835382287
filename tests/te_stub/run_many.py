"""`tests/run_many.py` with Transformer Engine's Python over the stub; says at the end what of the stub was called."""

import os
import sys

from tests import run_many

if __name__ == "__main__":
    from tests.te_stub import on_cpu

    on_cpu.install()
    from megatron_meap.backend import device

    device.prepare()
    on_cpu.let_megatron_use_it()
    run_many.main()
    if os.environ["RANK"] == "0":
        print(f"stub calls: {dict(sys.modules['transformer_engine_torch'].CALLS)}", flush=True)
