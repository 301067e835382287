#!/usr/bin/env bash
# A Llama-3-style model of 70B parameters.
#
#   DATA=data/train_text_document TOKENIZER=models/llama-3 sbatch --nodes 16 examples/slurm/multi_node.sbatch \
#     examples/pretrain/llama_70b.sh
#
# Sixteen nodes of 8 H100 with 80 GB, as it stands: TP within a node, an interleaved pipeline over four, the sequence
# over two. `--plan --gpu h200 --compare 5` proposes layouts for other numbers and kinds of GPUs.
set -euo pipefail
NNODES=${NNODES:-16} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TP=${TP:-4} PP=${PP:-4} CP=${CP:-2}
. "$(dirname "$0")/launch.sh"

RUN=${RUN:-runs/llama-70b-$OBJECTIVE}
tokenizer_flags
data_flags

MODEL=(
  --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672
  --num-attention-heads 64 --group-query-attention --num-query-groups 8
  --seq-length 8192 --max-position-embeddings 8192
  --position-embedding-type rope --rotary-base 500000 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
  --disable-bias-linear --untie-embeddings-and-output-weights
  --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
)
MEAP=(--meap-mask-ratio "$MASK_RATIO")
TRAINING=(
  --bf16 --micro-batch-size "${MICRO_BATCH:-1}" --global-batch-size "${GLOBAL_BATCH:-512}"
  --train-iters "${TRAIN_ITERS:-240000}" # 1.0T tokens
  --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --lr-warmup-iters 2000
  --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed 3407
)
LAYOUT=(
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
if ((TP > 1)); then LAYOUT+=(--sequence-parallel --tp-comm-overlap); fi
if ((PP > 1)); then LAYOUT+=(--num-layers-per-virtual-pipeline-stage "${VIRTUAL_LAYERS:-5}"); fi
LOGGING=(--log-interval 10 --eval-interval 1000 --eval-iters 10)
CHECKPOINTS=(
  --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 500 --meap-keep-last 3 --async-save
)

launch "${MODEL[@]}" "${MEAP[@]}" "${TOKENIZER_FLAGS[@]}" "${DATA_FLAGS[@]}" "${TRAINING[@]}" "${LAYOUT[@]}" \
  "${LOGGING[@]}" "${CHECKPOINTS[@]}" "$@"
