#!/usr/bin/env bash
# Extend a model of the paper to a context of 64K: RoPE base 640,000, sequences of 65,536 tokens.
#
#   SIZE=1.1b CHECKPOINT=runs/paper-1.1b-meap/checkpoints DATA=... TOKENIZER=... bash examples/pretrain/long_context.sh
#
# The first start takes the weights of CHECKPOINT, every later one resumes. The paper names the base and the length; the
# length of the extension and its learning rate are our choice. DATA should hold long documents.
set -euo pipefail
TP=${TP:-1} PP=${PP:-1} CP=${CP:-8}
. "$(dirname "$0")/launch.sh"

need CHECKPOINT "the checkpoints of the model to extend (its --save)" runs/paper-1.1b-meap/checkpoints
SIZE=${SIZE:-1.1b}
case $SIZE in #                layers hidden heads FFN
  0.1b) read -r LAYERS HIDDEN HEADS FFN <<< "12  768 12 2048" ;;
  0.3b) read -r LAYERS HIDDEN HEADS FFN <<< "24 1024 16 2736" ;;
  0.5b) read -r LAYERS HIDDEN HEADS FFN <<< "24 1024 16 4864" ;;
  1.1b) read -r LAYERS HIDDEN HEADS FFN <<< "24 2048 32 5632" ;;
  *) stop "SIZE=$SIZE: the paper's sizes are 0.1b, 0.3b, 0.5b and 1.1b" ;;
esac
TRAIN_ITERS=${TRAIN_ITERS:-1000}
RUN=${RUN:-runs/paper-$SIZE-64k-$OBJECTIVE}
tokenizer_flags
data_flags

MODEL=(
  --num-layers "$LAYERS" --hidden-size "$HIDDEN" --ffn-hidden-size "$FFN"
  --num-attention-heads "$HEADS" --kv-channels 64 --group-query-attention --num-query-groups 2
  --seq-length 65536 --max-position-embeddings 65536
  --position-embedding-type rope --rotary-base 640000 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
  --disable-bias-linear --untie-embeddings-and-output-weights
  --attention-dropout 0 --hidden-dropout 0
  --make-vocab-size-divisible-by 64
)
MEAP=(--meap-mask-ratio "$MASK_RATIO" --meap-decay-all-parameters)
TRAINING=(
  --bf16 --micro-batch-size "${MICRO_BATCH:-1}" --global-batch-size "${GLOBAL_BATCH:-16}" --train-iters "$TRAIN_ITERS" # 1.0B tokens
  --lr 4e-5 --min-lr 4e-6 --lr-decay-style cosine --lr-warmup-iters $((TRAIN_ITERS / 10))
  --weight-decay 0.05 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed 3407
)
LAYOUT=(
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
if ((TP > 1)); then LAYOUT+=(--sequence-parallel); fi
LOGGING=(--log-interval 10 --eval-interval 200 --eval-iters 5)
CHECKPOINTS=(
  --pretrained-checkpoint "$CHECKPOINT"
  --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 200 --meap-keep-last 2
)

launch "${MODEL[@]}" "${MEAP[@]}" "${TOKENIZER_FLAGS[@]}" "${DATA_FLAGS[@]}" "${TRAINING[@]}" "${LAYOUT[@]}" \
  "${LOGGING[@]}" "${CHECKPOINTS[@]}" "$@"
