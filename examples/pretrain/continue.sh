#!/usr/bin/env bash
# Continue the pretraining of a published model with MEAP.
#
#   python tools/convert_checkpoint.py import --load models/Llama-3.2-1B --output checkpoints/llama
#   CHECKPOINT=checkpoints/llama DATA=data/train_text_document bash examples/pretrain/continue.sh
#
# The import brings the model's flags, its tokenizer with [MASK] (checkpoints/llama/tokenizer: preprocess DATA with it)
# and the weights for the first start; every later start resumes. The budget and learning rate are our choice.
set -euo pipefail
. "$(dirname "$0")/launch.sh"

TRAIN_ITERS=${TRAIN_ITERS:-5000}
imported_flags
RUN=${RUN:-runs/continue-$(basename "$CHECKPOINT")-$OBJECTIVE}
data_flags

MEAP=(--meap-mask-ratio "$MASK_RATIO")
TRAINING=(
  --seq-length "${SEQ_LENGTH:-4096}" --attention-dropout 0 --hidden-dropout 0
  --bf16 --micro-batch-size "${MICRO_BATCH:-1}" --global-batch-size "${GLOBAL_BATCH:-256}" --train-iters "$TRAIN_ITERS" # 5.2B tokens
  --lr 5e-5 --min-lr 5e-6 --lr-decay-style cosine --lr-warmup-iters $((TRAIN_ITERS / 100))
  --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed 3407
)
LAYOUT=(
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
if ((TP > 1)); then LAYOUT+=(--sequence-parallel); fi
LOGGING=(--log-interval 10 --eval-interval 500 --eval-iters 10)
CHECKPOINTS=(
  --pretrained-checkpoint "$CHECKPOINT"
  --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 500 --meap-keep-last 2
)

launch "${IMPORTED_FLAGS[@]}" "${MEAP[@]}" "${DATA_FLAGS[@]}" "${TRAINING[@]}" "${LAYOUT[@]}" "${LOGGING[@]}" \
  "${CHECKPOINTS[@]}" "$@"
