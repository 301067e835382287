#!/usr/bin/env bash
# The paper's 20B, 40B and 60B tokens of its 1.1b model as one run with a constant learning rate and three branches of it,
# each of which decays over its last tenth (WSD): 66,000 steps in place of the 120,000 of three whole runs.
#
#   DATA=... TOKENIZER=... bash examples/pretrain/paper_wsd.sh               the stable run, 54,000 steps
#   BUDGET=20 DATA=... TOKENIZER=... bash examples/pretrain/paper_wsd.sh     its branch of 20B tokens, 18,000 + 2,000 steps
#   ... bash examples/pretrain/paper_wsd.sh --dry-run                        shows what would run
#
# BUDGET=40 and 60 branch at 36,000 and 54,000. tools/branch_run.py makes a branch once the stable run has been there; the
# recipe says how. All else, MASK_RATIO=0 and OPTIMIZER=muon too, is as in paper.sh.
set -euo pipefail
here=$(dirname "$0")
. "$here/launch.sh"

export SIZE=${SIZE:-1.1b}
STEPS=${STEPS:-60000} # of the longest branch
STABLE=${STABLE:-runs/paper-wsd-$SIZE-$OBJECTIVE}
COMMON=(--lr-warmup-iters $((STEPS / 30)) --save-interval $((STEPS / 100)))
if [ -z "${BUDGET:-}" ]; then
  export RUN=$STABLE TRAIN_ITERS=$((STEPS * 9 / 10))
  exec bash "$here/paper.sh" "${COMMON[@]}" --lr-decay-style constant --meap-data-samples $((STEPS * ${GLOBAL_BATCH:-256})) \
    --meap-keep-every $((STEPS * 3 / 10)) "$@"
fi
[[ $BUDGET =~ ^(20|40|60)$ ]] || stop "BUDGET=$BUDGET: must be 20, 40 or 60, in billions of tokens"
export RUN=${RUN:-$STABLE-${BUDGET}b} TRAIN_ITERS=$((STEPS * BUDGET / 60))
FLAGS=$RUN/checkpoints/branch_flags.txt
[ -f "$FLAGS" ] || stop "there is no branch in $RUN/checkpoints yet; make it: python tools/branch_run.py" \
  "$STABLE/checkpoints --at $((TRAIN_ITERS * 9 / 10)) --decay $((TRAIN_ITERS / 10)) --save $RUN/checkpoints"
exec bash "$here/paper.sh" "${COMMON[@]}" "@$FLAGS" "$@"
