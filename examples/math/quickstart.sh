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

cd "$run_dir"
code=0
rlinf train smollm2-135m-grpo-cpu "$@" || code=$?
printf '\nquickstart: set-up %d s, run %d s\n' "$setup_seconds" "$((SECONDS - setup_seconds))"
exit "$code"
