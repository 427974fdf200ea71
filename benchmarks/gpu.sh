#!/usr/bin/env bash
# All tests marked gpu, all benchmarks and a short full-size training of both tasks on CUDA: OUT/gpu.json and OUT/gpu.md.
# ./benchmarks/gpu.sh OUT [--rounds 3] [--prostate_dir DIR] [--fundus_dir DIR] [--only tests|benchmarks|training]
# PYTHON: an environment with a torch for CUDA; the pinned requirements are those of a CPU.
set -euo pipefail
mkdir -p "${1:?"error: give a folder for the results: ./benchmarks/gpu.sh OUT"}"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu --output_dir "$out" "$@"
