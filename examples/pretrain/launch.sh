# Sourced by every recipe: the variables that they share, and `launch`, which runs torchrun on this node.
#
# On one node nothing is needed. On several, each node runs the same recipe with its own NODE_RANK:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 DATA=... TOKENIZER=... bash examples/pretrain/paper.sh     # and NODE_RANK=1
# With `--dry-run` among its words nothing is launched: one process shows what would run on NNODES x GPUS_PER_NODE; with
# `--plan` one says what it needs in memory and time (tools/plan_run.py, whose flags may follow).
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -x "$ROOT/.venv/bin/torchrun" ]; then PATH="$ROOT/.venv/bin:$PATH"; fi

NNODES=${NNODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}            # with MEAP_DEVICE=cpu: processes
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}    # of this node, 0 to NNODES - 1
MASTER_ADDR=${MASTER_ADDR:-}                 # a name or address of node 0 that all nodes reach
MASTER_PORT=${MASTER_PORT:-29500}
MASK_RATIO=${MASK_RATIO:-0.15}               # 0: the next-token twin of any recipe
OPTIMIZER=${OPTIMIZER:-adam}                 # or muon (pip install 'megatron-meap[muon]'), at the learning rate of adam
TP=${TP:-1} PP=${PP:-1} CP=${CP:-1}          # tensor, pipeline and context parallel; what is left is data parallel
FP8=${FP8:-}                                 # hybrid or e4m3: matrix products in fp8 (Transformer Engine, H100 and later)
FP8_RECIPE=${FP8_RECIPE:-}                   # how fp8 is scaled: delayed (Megatron's default), tensorwise, blockwise, mxfp8
NUMA_BINDING=${NUMA_BINDING:-}               # ranks run on the cores beside their GPU (node, where numactl is); none: anywhere
case $MASK_RATIO in 0 | 0.0) OBJECTIVE=ntp ;; *) OBJECTIVE=meap ;; esac

stop() { echo "error: $*" >&2; exit 2; }

# need DATA "prefixes of preprocessed data": end with one line where a variable is not set
need() { [ -n "${!1:-}" ] || stop "$1 is not set: $2; for example $1=$3"; }

# Flags of the tokenizer in TOKENIZER: a SentencePiece .model, or a Hugging Face directory.
tokenizer_flags() {
  need TOKENIZER "the tokenizer the data was made with, a SentencePiece .model or a Hugging Face directory" data/tokenizer.model
  case $TOKENIZER in
    *.model) TOKENIZER_FLAGS=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER") ;;
    *) TOKENIZER_FLAGS=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER") ;;
  esac
}

# Flags of a model that tools/convert_checkpoint.py imported to CHECKPOINT, its tokenizer's among them.
imported_flags() {
  need CHECKPOINT "the directory that tools/convert_checkpoint.py import wrote" checkpoints/llama
  [ -f "$CHECKPOINT/megatron_flags.txt" ] || stop "CHECKPOINT=$CHECKPOINT: has no megatron_flags.txt; import the model with tools/convert_checkpoint.py import"
  mapfile -t IMPORTED_FLAGS < <(xargs -n1 < "$CHECKPOINT/megatron_flags.txt")
}

# Flags of the data: DATA holds one prefix, or weights and prefixes in turn; SPLIT parts it for validation.
data_flags() {
  need DATA "the prefix of the data that tools/preprocess_data.py wrote" data/train_text_document
  # shellcheck disable=SC2206  # several words are meant
  DATA_FLAGS=(--data-path $DATA --split "${SPLIT:-998,2,0}" --num-workers 2)
  if [ -n "${DATA_CACHE:-}" ]; then DATA_FLAGS+=(--data-cache-path "$DATA_CACHE"); fi
}

_check_gpus() {
  local name
  for name in NNODES GPUS_PER_NODE TP PP CP; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || stop "$name=${!name}: must be a whole number above 0"
  done
  local part=$((TP * PP * CP)) world=$((NNODES * GPUS_PER_NODE)) found
  if ((world % part)); then
    stop "this recipe needs a multiple of $part GPUs (TP $TP x PP $PP x CP $CP), but NNODES $NNODES x GPUS_PER_NODE" \
      "$GPUS_PER_NODE is $world; give it more, or lower TP, PP or CP"
  fi
  [ "$1" = launch ] && [ "${MEAP_DEVICE:-}" != cpu ] || return 0
  found=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
  if ((found < GPUS_PER_NODE)); then
    stop "node $(hostname) has $found GPUs, the recipe wants GPUS_PER_NODE=$GPUS_PER_NODE; set GPUS_PER_NODE," \
      "or MEAP_DEVICE=cpu to train on the processor"
  fi
}

# Flags of every recipe on a GPU: without the first, logits take several times their own memory.
gpu_flags() {
  GPU_FLAGS=(--cross-entropy-loss-fusion)
  if [ -n "$FP8" ]; then GPU_FLAGS+=(--fp8-format "$FP8"); fi
  if [ -n "$FP8_RECIPE" ]; then GPU_FLAGS+=(--fp8-recipe "$FP8_RECIPE"); fi
}

# Flags of the optimizer. Muon's updates are given the size of AdamW's (0.2), and with tensor parallelism it works on whole
# matrices, so that the layout does not change what is learned.
optimizer_flags() {
  case $OPTIMIZER in
    adam) OPTIMIZER_FLAGS=() ;;
    muon) OPTIMIZER_FLAGS=(--optimizer muon --muon-momentum 0.95 --muon-nesterov --muon-extra-scale-factor 0.2 --muon-tp-mode duplicated) ;;
    *) stop "OPTIMIZER=$OPTIMIZER: must be adam or muon" ;;
  esac
}

# Whether this node has several parts of memory, and PyTorch and the system the means to bind processes to them.
_binds_to_numa() {
  [ "$MEAP_DEVICE" = cuda ] && [ -d /sys/devices/system/node/node1 ] && command -v numactl >/dev/null &&
    python -c 'import importlib.util as u, os, sys; sys.exit(not os.path.isdir(u.find_spec("torch").submodule_search_locations[0] + "/numa"))' >/dev/null
}

# A variable that is almost the name of one that this recipe reads is probably a typo, and would change nothing.
_warn_of_typos() {
  command -v python3 >/dev/null || return 0
  python3 - "${BASH_SOURCE[0]}" "$0" >&2 <<'END'
import difflib, os, re, sys
known = {name for path in sys.argv[1:] for name in re.findall(r"\b[A-Z][A-Z0-9_]+\b", open(path).read())}
for name in sorted(os.environ.keys() - known):
    if close := difflib.get_close_matches(name, known, 1, 0.85):
        print(f"warning: {name} is set, but this recipe does not read it; did you mean {close[0]}?")
END
}

# launch FLAGS...: pretrain_gpt_meap.py under torchrun; never returns.
launch() {
  local word words=() look='' nodes=(--standalone)
  _warn_of_typos
  gpu_flags
  optimizer_flags
  set -- "${GPU_FLAGS[@]}" "${OPTIMIZER_FLAGS[@]}" "$@" # the recipe's own and the caller's win
  for word in "$@"; do
    case $word in
      --dry-run) look=pretrain_gpt_meap.py words+=("$word") ;;
      --plan) look=tools/plan_run.py words+=(--gpus-per-node "$GPUS_PER_NODE") ;;
      *) words+=("$word") ;;
    esac
  done
  export MEAP_DEVICE=${MEAP_DEVICE:-cuda} # a node whose PyTorch cannot use its GPUs must not train on its processor
  if [ -n "$look" ]; then
    _check_gpus look
    export RANK=0 LOCAL_RANK=0 WORLD_SIZE=$((NNODES * GPUS_PER_NODE))
    exec python "$ROOT/$look" "${words[@]}"
  fi
  _check_gpus launch
  if ((NNODES > 1)); then
    need MASTER_ADDR "the name or address of node 0, which all nodes reach" node1
    need NODE_RANK "the number of this node, 0 to $((NNODES - 1))" 0
    nodes=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
  fi
  if [ -z "$NUMA_BINDING" ] && _binds_to_numa; then NUMA_BINDING=node; fi
  case $NUMA_BINDING in '' | none) ;; *) nodes+=(--numa-binding "$NUMA_BINDING") ;; esac
  # SIGUSR1 and SIGTERM reach the ranks, which save and leave with status 75; they have ten minutes for it.
  exec torchrun "${nodes[@]}" --nproc_per_node "$GPUS_PER_NODE" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 600 "$ROOT/pretrain_gpt_meap.py" "$@"
}
