#!/usr/bin/env bash
# Train with GRPO: run_main_math_grpo_megatron.sh [CONFIG] [key=value ...] [--dry-run]
# CONFIG is a YAML file or the stem of one in examples/math/config (default qwen2.5-1.5b-grpo-megatron).
# On several nodes run ray_utils/start_ray.sh on each first, then this on the head node.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [[ -f "$root/.venv/bin/activate" ]]; then
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
fi

export TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

config=qwen2.5-1.5b-grpo-megatron
if [[ $# -gt 0 && "$1" != -* && "$1" != *=* ]]; then
  config="$1"
  shift
fi
exec "$(command -v python || command -v python3)" -m rlinf train "$config" "$@"
