"""`python -m megatron_meap` is the command `megatron-meap`."""

from megatron_meap.cli import main

main()
