#!/usr/bin/env bash
# A Llama-3-style model of the 7B class (Llama 3's 8B shape: 7.2B parameters with a vocabulary of 32,000, 8.0B with 128,256).
#
#   DATA=data/train_text_document TOKENIZER=data/tokenizer.model bash examples/pretrain/llama_7b.sh
#
# Four nodes of 8 GPUs with 80 GB, as it stands; TP, PP, CP, NNODES and GPUS_PER_NODE make it any other number.
set -euo pipefail
NNODES=${NNODES:-4} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TP=${TP:-2} PP=${PP:-1} CP=${CP:-1}
. "$(dirname "$0")/launch.sh"

RUN=${RUN:-runs/llama-7b-$OBJECTIVE}
tokenizer_flags
data_flags

MODEL=(
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
  --num-attention-heads 32 --group-query-attention --num-query-groups 8
  --seq-length 8192 --max-position-embeddings 8192
  --position-embedding-type rope --rotary-base 500000 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
  --disable-bias-linear --untie-embeddings-and-output-weights
  --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
)
MEAP=(--meap-mask-ratio "$MASK_RATIO")
TRAINING=(
  --bf16 --micro-batch-size "${MICRO_BATCH:-1}" --global-batch-size "${GLOBAL_BATCH:-512}"
  --train-iters "${TRAIN_ITERS:-240000}" # 1.0T tokens
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
  --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed 3407
)
LAYOUT=(
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
if ((TP > 1)); then LAYOUT+=(--sequence-parallel); fi
LOGGING=(--log-interval 10 --eval-interval 1000 --eval-iters 10)
CHECKPOINTS=(
  --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 500 --meap-keep-last 3 --async-save
)

launch "${MODEL[@]}" "${MEAP[@]}" "${TOKENIZER_FLAGS[@]}" "${DATA_FLAGS[@]}" "${TRAINING[@]}" "${LAYOUT[@]}" \
  "${LOGGING[@]}" "${CHECKPOINTS[@]}" "$@"
