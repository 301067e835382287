#!/usr/bin/env bash
# The paper's models (arXiv 2502.07490): 0.1b, 0.3b, 0.5b and 1.1b parameters, exactly as its official code trains them.
#
#   SIZE=0.3b DATA=data/c4_text_document TOKENIZER=data/tokenizer.model bash examples/pretrain/paper.sh
#   SIZE=0.3b MASK_RATIO=0 ...                        the next-token twin: nothing else differs
#   SIZE=1.1b TRAIN_ITERS=20000 ...                   21B tokens; 40000, 60000 and 190000 are the other budgets
#   ... bash examples/pretrain/paper.sh --dry-run     shows what would run
#
# Data: C4, each document BOS + text + EOS (tools/preprocess_data.py --append-eod --prepend-bos), Llama-2's tokenizer:
# its 32,000 tokens and [MASK] make 32,064 rows. Resumes from its own checkpoints. More variables: launch.sh.
set -euo pipefail
. "$(dirname "$0")/launch.sh"

SIZE=${SIZE:-0.1b}
case $SIZE in #                layers hidden heads FFN steps, and sequences at a time on a GPU
  0.1b) read -r LAYERS HIDDEN HEADS FFN STEPS MICRO <<< "12  768 12 2048  1907 8" ;; # 2.0B tokens
  0.3b) read -r LAYERS HIDDEN HEADS FFN STEPS MICRO <<< "24 1024 16 2736  4768 8" ;; # 5.0B
  0.5b) read -r LAYERS HIDDEN HEADS FFN STEPS MICRO <<< "24 1024 16 4864 10000 8" ;; # 10.5B
  1.1b) read -r LAYERS HIDDEN HEADS FFN STEPS MICRO <<< "24 2048 32 5632 40000 4" ;; # 42B
  *) stop "SIZE=$SIZE: the paper's sizes are 0.1b, 0.3b, 0.5b and 1.1b" ;;
esac
TRAIN_ITERS=${TRAIN_ITERS:-$STEPS}
RUN=${RUN:-runs/paper-$SIZE-$OBJECTIVE}
tokenizer_flags
data_flags

MODEL=(
  --num-layers "$LAYERS" --hidden-size "$HIDDEN" --ffn-hidden-size "$FFN"
  --num-attention-heads "$HEADS" --kv-channels 64 --group-query-attention --num-query-groups 2
  --seq-length 4096 --max-position-embeddings 4096
  --position-embedding-type rope --rotary-base 10000 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
  --disable-bias-linear --untie-embeddings-and-output-weights
  --attention-dropout 0 --hidden-dropout 0
  --make-vocab-size-divisible-by 64
)
MEAP=(--meap-mask-ratio "$MASK_RATIO" --meap-official-init --meap-decay-all-parameters)
TRAINING=(
  --bf16 --micro-batch-size "${MICRO_BATCH:-$MICRO}" --global-batch-size "${GLOBAL_BATCH:-256}" --train-iters "$TRAIN_ITERS"
  --lr 4e-4 --min-lr 4e-5 --lr-decay-style cosine --lr-warmup-iters $((TRAIN_ITERS / 10))
  --weight-decay 0.05 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed 3407
)
LAYOUT=( # the models are small: by default data parallel alone
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
if ((TP > 1)); then LAYOUT+=(--sequence-parallel); fi
LOGGING=(--log-interval 10 --eval-interval 500 --eval-iters 10)
CHECKPOINTS=(
  --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 500 --meap-keep-last 3
)

launch "${MODEL[@]}" "${MEAP[@]}" "${TOKENIZER_FLAGS[@]}" "${DATA_FLAGS[@]}" "${TRAINING[@]}" "${LAYOUT[@]}" \
  "${LOGGING[@]}" "${CHECKPOINTS[@]}" "$@"
