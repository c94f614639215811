#!/usr/bin/env bash
# On a machine with one NVIDIA GPU: build, test and measure, also without a network. Stages, all in this order by default:
#   build   the extension, with the python3 that has torch (PYTHON=... names another); liburing where its header is,
#           or from a package file LIBURING_DEB=... carried along; otherwise the POSIX backend
#   tests   the tests marked `gpu`
#   train   a full fine-tune of 1 B and of 3 B parameters with 8 GB of device memory against everything on the GPU
# Example: benchmarks/gpu.sh build tests
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
command -v nvidia-smi >/dev/null || { echo "no NVIDIA driver found; this script needs a GPU"; exit 1; }

build() {
  if [ -n "${LIBURING_DEB:-}" ] && [ ! -e /usr/include/liburing.h ]; then
    for package in $LIBURING_DEB; do dpkg -x "$package" /; done
    ldconfig
  fi
  "$PYTHON" -c 'import torch, pybind11; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  "$PYTHON" setup.py -q build_ext --inplace
  "$PYTHON" -m offload.cli doctor --storage .
}

tests() { "$PYTHON" -m pytest -q -m gpu tests; }

train() {
  mkdir -p "$RESULTS"
  "$PYTHON" benchmarks/gpu_train.py --model 1b --batch 8,32 --json "$RESULTS/gpu_train_1b.json"
  "$PYTHON" benchmarks/gpu_train.py --model 3b --batch 32 --steps 3 --json "$RESULTS/gpu_train_3b.json"
}

[ $# -gt 0 ] || set -- build tests train
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
for stage in "$@"; do
  case $stage in
    build|tests|train) echo "== $stage"; "$stage" ;;
    *) echo "no stage $stage; the stages are build, tests, train"; exit 2 ;;
  esac
done
