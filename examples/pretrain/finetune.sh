#!/usr/bin/env bash
# Fine-tune a model with MEAP on conversations (docs/finetuning.md).
#
#   python tools/convert_checkpoint.py import --load models/Llama-3-8B --output checkpoints/llama
#   CHECKPOINT=checkpoints/llama DATA=data/alpaca.jsonl bash examples/pretrain/finetune.sh
#
# DATA: JSON lines. MASK_RATIO is the share of an answer's tokens that its masked copy loses: 0.10 in the paper.
set -euo pipefail
MASK_RATIO=${MASK_RATIO:-0.10} TP=${TP:-2}
. "$(dirname "$0")/launch.sh"
[ "$CP" = 1 ] || stop "CP=$CP: packed rows are not cut over context-parallel ranks; use TP or PP"

TRAIN_ITERS=${TRAIN_ITERS:-1000}
imported_flags
need DATA "the conversations, a file of JSON lines" data/alpaca.jsonl
RUN=${RUN:-runs/finetune-$(basename "$CHECKPOINT")-$OBJECTIVE}

MEAP=(--meap-sft --meap-mask-ratio "$MASK_RATIO")
if [ -n "${TEMPLATE:-}" ]; then MEAP+=(--meap-sft-template "$TEMPLATE"); fi # default: the tokenizer's own
DATA_FLAGS=(--data-path "$DATA" --split "${SPLIT:-98,2,0}" --num-workers 2)
if [ -n "${DATA_CACHE:-}" ]; then DATA_FLAGS+=(--data-cache-path "$DATA_CACHE"); fi
TRAINING=(
  --seq-length "${SEQ_LENGTH:-4096}" --attention-dropout 0 --hidden-dropout 0
  --bf16 --micro-batch-size "${MICRO_BATCH:-1}" --global-batch-size "${GLOBAL_BATCH:-32}" --train-iters "$TRAIN_ITERS"
  --lr 2e-5 --min-lr 2e-6 --lr-decay-style cosine --lr-warmup-iters $((TRAIN_ITERS * 3 / 100))
  --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed 3407
)
LAYOUT=(
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
if ((TP > 1)); then LAYOUT+=(--sequence-parallel); fi
LOGGING=(--log-interval 10 --eval-interval 100 --eval-iters 10)
CHECKPOINTS=(
  --pretrained-checkpoint "$CHECKPOINT"
  --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 200 --meap-keep-last 2
)

launch "${IMPORTED_FLAGS[@]}" "${MEAP[@]}" "${DATA_FLAGS[@]}" "${TRAINING[@]}" "${LAYOUT[@]}" "${LOGGING[@]}" \
  "${CHECKPOINTS[@]}" "$@"
