#!/usr/bin/env bash
# Pretrain the small model of the quickstart: a Llama-style GPT of 5 million parameters, on one machine without a GPU.
# It resumes from its own checkpoints. To train on:   TRAIN_ITERS=640 bash examples/quickstart/train.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -x .venv/bin/torchrun ]; then PATH="$PWD/.venv/bin:$PATH"; fi

export MEAP_DEVICE=${MEAP_DEVICE:-cpu}  # auto: the GPU, where there is one for each process
RUN=${RUN:-runs/demo}                   # data, checkpoints and logs
PROCESSES=${PROCESSES:-2}               # data-parallel ranks
TRAIN_ITERS=${TRAIN_ITERS:-320}
MASK_RATIO=${MASK_RATIO:-0.15}          # 0: plain next-token prediction

MODEL=(
  --num-layers 4 --hidden-size 256 --ffn-hidden-size 704
  --num-attention-heads 4 --group-query-attention --num-query-groups 2
  --seq-length 256 --max-position-embeddings 256
  --position-embedding-type rope --normalization RMSNorm --swiglu
  --disable-bias-linear --untie-embeddings-and-output-weights
  --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.03
  --make-vocab-size-divisible-by 64
)
MEAP=(--meap-mask-ratio "$MASK_RATIO")
DATA=(
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$RUN/tokenizer.model"
  --train-data-path "$RUN/train_text_document" --valid-data-path "$RUN/valid_text_document"
  --num-workers 1
)
TRAINING=(
  --micro-batch-size 8 --global-batch-size 16 --train-iters "$TRAIN_ITERS"
  --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 40
  --weight-decay 0.05 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed 3407
  --override-opt_param-scheduler        # a longer run has a schedule of its own
)
LOGGING=(--log-interval 5 --eval-interval 80 --eval-iters 5)
CHECKPOINTS=(--save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 80 --meap-keep-last 2)

exec torchrun --standalone --nproc_per_node "$PROCESSES" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
  --shutdown-timeout 600 pretrain_gpt_meap.py \
  "${MODEL[@]}" "${MEAP[@]}" "${DATA[@]}" "${TRAINING[@]}" "${LOGGING[@]}" "${CHECKPOINTS[@]}" "$@"
