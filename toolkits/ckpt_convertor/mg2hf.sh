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

mg="${1:-${CKPT_PATH_MG:-}}"
hf="${2:-${CKPT_PATH_HF:-}}"
if [[ -z "$hf" || "$mg" == -* ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2
  [[ "$mg" == -h || "$mg" == --help ]] && exit 0
  exit 2
fi
original="${3:-${CKPT_PATH_ORIGINAL_HF:-}}"
exec "$(command -v python || command -v python3)" -m rlinf export "$mg" "$hf" ${original:+--model-dir "$original"} "${@:4}"
