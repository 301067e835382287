#!/usr/bin/env bash
# For whoever has a GPU for half an hour: what is installed, the card's speed, tests/gpu, training speed in four sizes,
# checkpoints, kill and resume, what waits for the device. A report is written after every step (runs/gpu/report.md).
#
#     bash tools/prove_gpu.sh                      # --minutes 30 --report runs/gpu --only TEXT
#
# A bare machine needs PyTorch with CUDA, and in wheels/ what it cannot download. Next to an image with PyTorch, transformers,
# tensorboard and pytest one was given: megatron-core (0.19.2), gigatoken, orjson, zstandard, omegaconf, emerging-optimizers,
# flask, flask-restful, aniso8601, blinker, itsdangerous, pytz; and for Transformer Engine pydantic, pydantic-core,
# annotated-types, typing-inspection, nvdlfw-inspect. Transformer Engine is used where it is installed; without it, PyTorch's attention.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
"$PYTHON" -c 'import torch' 2>/dev/null || { echo "error: $PYTHON has no PyTorch; name another one: PYTHON=..." >&2; exit 2; }
if ! "$PYTHON" -c 'import megatron.core' 2>/dev/null; then
  compgen -G 'wheels/*.whl' >/dev/null || { echo "error: no megatron-core, and no wheels/ with it" >&2; exit 2; }
  "$PYTHON" -m pip install --quiet --no-index --find-links wheels --no-deps wheels/*.whl
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" benchmarks/prove_gpu.py "$@"
