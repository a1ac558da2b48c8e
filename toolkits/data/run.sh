#!/usr/bin/env bash
# Problems for training and evaluation: run.sh generate|convert|check ..., the same words as after `rlinf data` (docs/data.md).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [[ -f "$root/.venv/bin/activate" ]]; then
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$(command -v python || command -v python3)" -m rlinf data "$@"
