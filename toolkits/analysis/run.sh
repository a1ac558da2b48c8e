#!/usr/bin/env bash
# What happened in runs, from their folders: run.sh report RUN_DIR, or run.sh compare RUN_A RUN_B, with the options of `rlinf report` and
# `rlinf compare` (docs/report.md, docs/compare.md).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [[ -f "$root/.venv/bin/activate" ]]; then
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [[ "${1:-}" != report && "${1:-}" != compare ]]; then
  echo "run.sh: the first word says what to do: run.sh report RUN_DIR, or run.sh compare RUN_A RUN_B" >&2
  exit 2
fi
exec "$(command -v python || command -v python3)" -m rlinf "$@"
