# Sourced by the batch scripts here, after they have set the site's variables: checks, launch, signals, requeue.
#
# The signal before the time limit (SIGUSR1, asked for by --signal=B:USR1@N) is passed to the ranks; they save a checkpoint
# and leave, and the job is requeued. A job that fails after it has trained is requeued too, MAX_FAILURES times in a row.
# A plain `scancel` comes as SIGTERM: they save as well, in the time that Slurm's KillWait gives, but the job is over.
set -euo pipefail

stop() { echo "error: $*" >&2; exit 2; }

# need DATA "the prefix of the data" data/train: end with one line where a variable is not set
need() { [ -n "${!1:-}" ] || stop "$1 is not set: $2; for example $1=$3 sbatch ..."; }

# run_recipe RECIPE FLAGS...: the whole life of a training job on its nodes.
run_recipe() {
  TRAINS=yes
  [ -f "${1:-}" ] || stop "recipe '${1:-}': no such file in $PWD; usage: sbatch SCRIPT examples/pretrain/RECIPE.sh [flags]"
  describe_nodes
  check_nodes
  export PET_TEE=3 # every rank's output goes to a file of its own, and to the job's
  # shellcheck disable=SC2016  # the variables are the nodes' own
  run_step srun --ntasks="$NNODES" --ntasks-per-node=1 --cpu-bind=quiet,none --wait=0 --kill-on-bad-exit=1 bash -c '
    export NODE_RANK=$SLURM_NODEID PET_LOG_DIR=$RANK_LOGS/node-$SLURM_NODEID
    # torchrun would guess both from what the host name resolves to, which may be the loopback
    export PET_LOCAL_ADDR=$(sed -n "$((SLURM_NODEID + 1))s/.*=//p" <<<"$ADDRESSES") PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0))
    mkdir -p "$PET_LOG_DIR" && exec bash "$@"' _ "$@"
}

# What the recipes ask for (examples/pretrain/launch.sh), and for their torchrun a c10d rendezvous on the first node.
describe_nodes() {
  local found=${SLURM_GPUS_ON_NODE:-} wanted=${NNODES:-$SLURM_JOB_NUM_NODES}
  [ "$wanted" = "$SLURM_JOB_NUM_NODES" ] || stop "NNODES=$wanted, but Slurm allocated $SLURM_JOB_NUM_NODES nodes; ask for them with sbatch --nodes $wanted"
  export MEAP_DEVICE=${MEAP_DEVICE:-cuda} # never the processor because a GPU does not work
  if [ "$MEAP_DEVICE" = cpu ]; then found=; fi
  export NNODES=$SLURM_JOB_NUM_NODES GPUS_PER_NODE=${GPUS_PER_NODE:-$found}
  need GPUS_PER_NODE "Slurm allocated no GPUs (sbatch --gpus-per-node); with MEAP_DEVICE=cpu say how many processes a node runs" 8
  # node=address, as Slurm itself reaches them, in the order of SLURM_NODEID
  export ADDRESSES
  ADDRESSES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk '
    NR == FNR { for (i = 1; i <= NF; i++) if (split($i, pair, "=") == 2) field[pair[1]] = pair[2]
                address[field["NodeName"]] = field["NodeAddr"]; next }
    { print $1 "=" ($1 in address ? address[$1] : $1) }' <(scontrol show node --oneliner "$SLURM_JOB_NODELIST") -)
  local first=${ADDRESSES%%$'\n'*}
  export MASTER_ADDR=${first#*=}
  export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # below the range that the kernel gives out
  export PET_NNODES=$NNODES PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT=$MASTER_ADDR:$MASTER_PORT
  export PET_RDZV_ID=$SLURM_JOB_ID-$RESTART
  if [ -n "${INTERFACE:-}" ]; then export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE; fi
  unset SLURM_CPUS_PER_TASK # every task gets all that the job has on its node
}

# Before minutes go into starting: every node has its GPUs and reaches every other one.
check_nodes() {
  local gpus=$GPUS_PER_NODE
  if [ "$MEAP_DEVICE" = cpu ]; then gpus=0; fi
  # shellcheck disable=SC2016,SC2086  # $0 and $@ are the nodes' own; ADDRESSES is a word a node
  srun --ntasks="$NNODES" --ntasks-per-node=1 --cpu-bind=quiet,none --wait=0 bash -c '
    cd "$0" 2>/dev/null || { echo "error: node $SLURMD_NODENAME does not see $0; CHECKOUT must be on a shared disk" >&2; exit 2; }
    exec python tools/check_nodes.py --index "$SLURM_NODEID" "$@"' \
    "$PWD" --gpus "$gpus" --port "$MASTER_PORT" --seconds "${CHECK_SECONDS:-60}" $ADDRESSES ||
    stop "job $SLURM_JOB_ID: its nodes cannot train together (see above), nothing was started; sbatch --exclude leaves a node out"
}

# run_step COMMAND...: run it, pass the signals on, and end the job as its outcome asks for.
run_step() {
  local status watcher=''
  "$@" &
  step=$!
  if [ -n "${HANG_MINUTES:-}" ]; then
    watch_heartbeat "$step" &
    watcher=$!
  fi
  [ -z "$asked" ] || kill "-$asked" "$step" || true # it came while the nodes were checked
  while true; do # a signal ends `wait`, but not the step
    status=0
    wait "$step" || status=$?
    kill -0 "$step" 2>/dev/null || break
  done
  [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
  finish "$status" "$asked"
}

# watch_heartbeat PROCESS: end it once the run, having begun, has given no sign of life for HANG_MINUTES.
watch_heartbeat() {
  while kill -0 "$1" 2>/dev/null; do
    if [ -n "$(find "$MEAP_HEARTBEAT" -mmin "+$HANG_MINUTES" 2>/dev/null)" ]; then
      echo "job $SLURM_JOB_ID: no sign of life for HANG_MINUTES=$HANG_MINUTES minutes; its ranks are ended"
      scancel --signal=TERM "$SLURM_JOB_ID" || true # its steps, not this script
      sleep "${HANG_MINUTES}m" >/dev/null 2>&1 # what still moves has saved; what hangs in a collective heeds no signal
      kill -TERM "$1" 2>/dev/null || true # srun kills them
      return
    fi
    sleep 15 >/dev/null 2>&1
  done
}

# heed SIGNAL: pass it on to the step, if there is one, and remember it.
heed() { asked=$1; [ -z "$step" ] || kill "-$1" "$step" 2>/dev/null || true; }

# finish STATUS SIGNAL: done, requeue, or give up.
finish() {
  local failures=$LOGS/failures reached before
  case $1,$2 in
    0,*) echo "job $SLURM_JOB_ID: done"; exit 0 ;;
    *,TERM) echo "job $SLURM_JOB_ID: cancelled"; exit 75 ;;
    *,USR1) rm -f "$failures"; requeue "stopped by Slurm's signal" ;;
    75,*) rm -f "$failures"; requeue "stopped before its last step" ;;
    16,* | 17,*) stop "job $SLURM_JOB_ID: a step's loss or gradients are not finite (status $1, see above); it is not requeued, as it would meet them again" ;;
  esac
  [ "$TRAINS" = yes ] || stop "job $SLURM_JOB_ID failed with status $1; it is not requeued"
  reached=$(grep -rhos ' iteration  *[0-9]*/' "$RANK_LOGS" | tr -dc '0-9\n' | sort -n | tail -n 1) || true
  [ -n "$reached" ] || stop "job $SLURM_JOB_ID failed with status $1 before its first logged step; it is not requeued, as it would fail again"
  before=$(sed -n '$s/.*step //p' "$failures" 2>/dev/null || true)
  if ((reached > ${before:-0})); then rm -f "$failures"; fi # further than the last time: not in a row
  echo "restart $RESTART: status $1, step $reached" >>"$failures"
  (($(wc -l <"$failures") <= MAX_FAILURES)) || stop "job $SLURM_JOB_ID failed more than MAX_FAILURES=$MAX_FAILURES times in a row; it is not requeued"
  requeue "failed with status $1"
}

# requeue REASON: back into the queue under the same number, whereupon Slurm ends this script.
requeue() {
  echo "job $SLURM_JOB_ID: $1; requeued, to resume from its last checkpoint"
  scontrol requeue "$SLURM_JOB_ID" || stop "job $SLURM_JOB_ID cannot be requeued; submit it again, it resumes"
  sleep 60
}

[ -n "${SLURM_JOB_ID:-}" ] || stop "not in a Slurm job: submit this script, sbatch $0"
cd "$CHECKOUT"
if [ -n "${SETUP:-}" ]; then
  set +eu # a site's scripts are not written for them
  eval "$SETUP" || stop "SETUP='$SETUP' fails on node $(hostname)"
  set -eu
fi
if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi
command -v torchrun >/dev/null || stop "no torchrun on $(hostname): run make in $CHECKOUT once, or load an environment by SETUP"
step='' asked='' TRAINS=no
trap 'heed USR1' USR1
trap 'heed TERM' TERM
RESTART=${SLURM_RESTART_COUNT:-0}
LOGS=${LOGS:-$PWD/runs/logs}/$SLURM_JOB_ID
export RANK_LOGS=$LOGS/restart-$RESTART MEAP_HEARTBEAT=$LOGS/restart-$RESTART/heartbeat
mkdir -p "$RANK_LOGS" || stop "LOGS: $RANK_LOGS cannot be made"
echo "job $SLURM_JOB_ID, restart $RESTART, on $SLURM_JOB_NODELIST; its ranks write to $RANK_LOGS"
