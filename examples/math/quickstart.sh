#!/usr/bin/env bash
# From nothing to a language model that learns to add, by reinforcement: quickstart.sh [key=value ...]
# Makes the environment, the model (SmolLM2-135M-Instruct) and the data, each once, then runs
# `rlinf train smollm2-135m-grpo-cpu key=value ...`. Model and data go to $RLINF_CACHE (default ~/.cache/rlinf).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export RLINF_CACHE="${RLINF_CACHE:-$HOME/.cache/rlinf}"
run_dir="$PWD"
cd "$root"

bash toolkits/setup/venv.sh
export PATH="$root/.venv/bin:$PATH"
python toolkits/setup/fetch_smollm2.py
rlinf data generate "$RLINF_CACHE/data/arithmetic"
setup_seconds=$SECONDS
printf 'quickstart: set-up took %d s\n\n' "$setup_seconds"

# glibc gives large buffers back to the kernel after each use and faults them in again; keeping them made a training step 2.7x faster.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-34359738368}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # waiting threads sleep: actor and engine share the cores

cd "$run_dir"
code=0
rlinf train smollm2-135m-grpo-cpu "$@" || code=$?
printf '\nquickstart: set-up %d s, run %d s\n' "$setup_seconds" "$((SECONDS - setup_seconds))"
exit "$code"
