#!/usr/bin/env bash
# Build Transformer Engine into .venv-te, which sees everything that is in .venv (run by: make te). No GPU is needed.
# .venv stays as it is, whatever becomes of the build; to begin again, delete .venv-te.
set -euo pipefail
cd "$(dirname "$0")/.."
VERSION=${TE_VERSION:-2.20.2}  # the one that tests/te has run with

site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
pip() { .venv-te/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

.venv/bin/python -m venv .venv-te
SHARED=$(site "$PWD/.venv")
OWN=$(site .venv-te)
# The extension only runs with the very PyTorch that it is compiled against: both environments share the one in .venv.
echo "$SHARED" > "$OWN/shared.pth"
pip install setuptools wheel pybind11 ninja cmake nvidia-mathdx

if nvcc --version 2>/dev/null | grep -q "release 13"; then
  CUDA_HOME=$(nvcc --dryrun -E -x c /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
else
  pip install --target .venv-te/nvcc "nvidia-cuda-nvcc>=13,<13.1"
  CUDA_HOME=$PWD/.venv-te/nvcc/nvidia/cu13
fi
# The headers and libraries that came with PyTorch: nvcc alone brings neither NCCL nor cuDNN nor cuSPARSE.
mkdir -p "$OWN/nvidia"
ln -sfn "$SHARED"/nvidia/* "$OWN/nvidia/" # and at run time Transformer Engine looks for them beside itself
export CUDA_HOME PATH="$CUDA_HOME/bin:$PWD/.venv-te/bin:$PATH" NVTE_FRAMEWORK=pytorch
export CPATH=$SHARED/nvidia/nccl/include:$SHARED/nvidia/cudnn/include:$SHARED/nvidia/cu13/include
export LIBRARY_PATH=$SHARED/nvidia/cu13/lib:$SHARED/nvidia/nccl/lib:$SHARED/nvidia/cudnn/lib
echo "building Transformer Engine $VERSION with $CUDA_HOME: ten minutes on two idle cores"
pip install "transformer-engine[core_cu13]==$VERSION"
# --no-cache-dir: pip would take up again what it once built, for whatever PyTorch
pip install --no-cache-dir --no-build-isolation "transformer-engine-torch==$VERSION"
.venv-te/bin/python -c 'import torch, transformer_engine.pytorch'  # torch first: it brings NCCL
touch .venv-te/installed
