#!/usr/bin/env bash
# A checkpoint as a Hugging Face model folder: mg2hf.sh CKPT_PATH_MG CKPT_PATH_HF [CKPT_PATH_ORIGINAL_HF [rlinf export options]]
# CKPT_PATH_MG is checkpoints/step_* of a run, or its actor/. The three may also be set in the environment.
set -euo pipefail

mg="${1:-${CKPT_PATH_MG:?checkpoints/step_* of a run}}"
hf="${2:-${CKPT_PATH_HF:?the folder to write}}"
original="${3:-${CKPT_PATH_ORIGINAL_HF:-}}"
exec python -m rlinf export "$mg" "$hf" ${original:+--model-dir "$original"} "${@:4}"
