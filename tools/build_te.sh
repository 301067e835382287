#!/usr/bin/env bash
# Compile Transformer Engine against the PyTorch in .venv and install it there, where training finds it. No GPU is needed,
# and no CUDA toolkit: without nvcc 13 PyPI's is taken. At run time it wants a driver for CUDA 13 (580 or newer).
#
#     bash tools/build_te.sh                # TE_VERSION=2.20.2 MAX_JOBS=4 (about 4 GB of memory for each job)
#
# With TE_ENV=.venv-te (make te) it goes into an environment of its own, which sees everything in .venv and leaves it alone.
set -euo pipefail
cd "$(dirname "$0")/.."
VERSION=${TE_VERSION:-2.20.2}  # the one that tests/te has run with
ENVIRONMENT=${TE_ENV:-.venv}
[ -x .venv/bin/python ] || { echo "error: no .venv here: run make first" >&2; exit 2; }
command -v c++ >/dev/null || { echo "error: no C++ compiler (c++): install one (apt install g++)" >&2; exit 2; }

site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
pip() { "$ENVIRONMENT/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

SHARED=$(site .venv)
if [ "$ENVIRONMENT" != .venv ]; then
  .venv/bin/python -m venv "$ENVIRONMENT"
  # The extension only runs with the very PyTorch that it is compiled against: both environments share the one in .venv.
  echo "$SHARED" > "$(site "$ENVIRONMENT")/shared.pth"
  # At run time Transformer Engine looks for PyTorch's libraries of CUDA beside itself.
  mkdir -p "$(site "$ENVIRONMENT")/nvidia"
  ln -sfn "$SHARED"/nvidia/* "$(site "$ENVIRONMENT")/nvidia/"
fi
pip install setuptools wheel pybind11 ninja cmake nvidia-mathdx

if nvcc --version 2>/dev/null | grep -q "release 13"; then
  CUDA_HOME=$(nvcc --dryrun -E -x c /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
else
  pip install --upgrade --target "$ENVIRONMENT/nvcc" "nvidia-cuda-nvcc>=13,<13.1" "nvidia-cuda-cccl>=13,<13.1"
  CUDA_HOME=$PWD/$ENVIRONMENT/nvcc/nvidia/cu13
fi
# The headers and libraries that came with PyTorch: nvcc alone brings neither NCCL nor cuDNN nor cuSPARSE.
export CUDA_HOME PATH="$CUDA_HOME/bin:$PWD/$ENVIRONMENT/bin:$PATH" NVTE_FRAMEWORK=pytorch
export CPATH=$SHARED/nvidia/nccl/include:$SHARED/nvidia/cudnn/include:$SHARED/nvidia/cu13/include
export LIBRARY_PATH=$SHARED/nvidia/cu13/lib:$SHARED/nvidia/nccl/lib:$SHARED/nvidia/cudnn/lib
echo "building Transformer Engine $VERSION into $ENVIRONMENT with $CUDA_HOME: ten minutes on two idle cores"
# PyTorch is pinned to what is there: pip must not replace it by another one.
TORCH="torch==$(.venv/bin/python -c 'import torch; print(torch.__version__.partition("+")[0])')"
pip install "$TORCH" "transformer-engine[core_cu13]==$VERSION"
# Without build isolation, in which pip would compile against a PyTorch that it fetches for the purpose; --no-cache-dir,
# as pip would take up again what it once built, for whatever PyTorch.
pip install --no-cache-dir --no-build-isolation "$TORCH" "transformer-engine-torch==$VERSION"
"$ENVIRONMENT/bin/python" -c 'import torch, transformer_engine.pytorch'  # torch first: it brings NCCL
echo "Transformer Engine $VERSION is in $ENVIRONMENT"
