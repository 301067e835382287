"""The command-line tools, a module each: `megatron-meap NAME`, or `python tools/NAME.py` in a checkout."""
