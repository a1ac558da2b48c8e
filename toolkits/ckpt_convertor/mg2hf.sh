#!/usr/bin/env bash
# A checkpoint as a Hugging Face model folder: mg2hf.sh CKPT_PATH_MG CKPT_PATH_HF [CKPT_PATH_ORIGINAL_HF [rlinf export options]]
# CKPT_PATH_MG is checkpoints/step_* of a run, or its actor/. The three may also be set in the environment.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [[ -f "$root/.venv/bin/activate" ]]; then
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

mg="${1:-${CKPT_PATH_MG:?checkpoints/step_* of a run}}"
hf="${2:-${CKPT_PATH_HF:?the folder to write}}"
original="${3:-${CKPT_PATH_ORIGINAL_HF:-}}"
exec "$(command -v python || command -v python3)" -m rlinf export "$mg" "$hf" ${original:+--model-dir "$original"} "${@:4}"
