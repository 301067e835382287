#!/usr/bin/env bash
# A recipe like those in examples/pretrain, of a model whose steps take milliseconds: FLAGS are read from a file.
set -euo pipefail
mapfile -t flags <"$FLAGS"
exec torchrun --nproc_per_node "$GPUS_PER_NODE" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 600 \
  pretrain_gpt_meap.py "${flags[@]}" --meap-mask-ratio "${MASK_RATIO:-0.15}" --save "$RUN/checkpoints" --load "$RUN/checkpoints" "$@"
