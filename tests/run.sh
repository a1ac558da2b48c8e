#!/usr/bin/env bash
# The tests, set-up included: run.sh [--full] [pytest arguments]
# Without --full: the fast tier (not marked slow or gpu), as many files at a time as there are cores, four at most. With it: then the slow
# tier, too, one test after the other, since most of them are runs of many processes with limits of time; tests that need a GPU skip
# themselves, with a reason; all others run as on a machine without one. --begin-until EPOCH skips slow ones that would begin later.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
export RLINF_CACHE="${RLINF_CACHE:-$HOME/.cache/rlinf}"

full=
if [[ "${1:-}" == --full ]]; then
  full=1
  shift
fi

bash toolkits/setup/venv.sh --dev
export PATH="$root/.venv/bin:$PATH"
if [[ -n "$full" ]]; then
  python toolkits/setup/fetch_smollm2.py
  rlinf data generate "$RLINF_CACHE/data/arithmetic"
  if [[ ! -e /dev/nvidiactl ]]; then bash toolkits/setup/sglang_cpu.sh; fi
fi
printf 'tests: set-up took %d s\n' "$SECONDS"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
failed=0
CUDA_VISIBLE_DEVICES="" python -m pytest -m "not slow and not gpu" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@" </dev/null || failed=$?
if [[ -n "$full" ]]; then
  if ((failed == 5)); then failed=0; fi # the arguments select slow tests only
  CUDA_VISIBLE_DEVICES="" python -m pytest -m "slow and not gpu" -n 0 "$@" </dev/null || { code=$? && ((code == 5)) || failed=$code; }
  python -m pytest -m gpu -n 0 "$@" </dev/null || { code=$? && ((code == 5)) || failed=$code; }
fi
exit "$failed"
