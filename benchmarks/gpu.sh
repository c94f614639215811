#!/usr/bin/env bash
# On a machine with one NVIDIA GPU: the tests marked `gpu`, then a 1 B full fine-tune with 8 GB of device memory
# against the same model entirely on the GPU. Further arguments go to benchmarks/gpu_train.py (see its --help).
set -euo pipefail
cd "$(dirname "$0")/.."
command -v nvidia-smi >/dev/null || { echo "no NVIDIA driver found; this script needs a GPU"; exit 1; }
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
make setup
# pytest exits with 5 where no test is marked gpu; that is said, and is no failure of the tests there are.
.venv/bin/python -m pytest -q -m gpu tests || { rc=$?; [ "$rc" = 5 ] && echo "no tests are marked gpu" || exit "$rc"; }
mkdir -p benchmarks/results
.venv/bin/python benchmarks/gpu_train.py --json benchmarks/results/gpu_train.json "$@"
