#!/usr/bin/env bash
# Examine a machine with one GPU: gpu_acceptance.sh [--wheels DIR] [--out DIR] [--model HF_DIR] [--cpu] [--parts PART ...]
# Runs the gpu tests, parity with CPU, a GRPO run, a trainer and a weight-sync benchmark; writes acceptance.json and acceptance.md.
# --wheels DIR: install from this folder alone, without internet. toolkits/setup/wheels.sh fills it, on a machine of the same kind.
# --cpu: a rehearsal with tiny shapes on a machine without a GPU. Exit code: 0 all parts passed, 1 one failed, 2 it could not begin.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
fail() {
  printf 'gpu_acceptance: %s\n' "$*" >&2
  exit 2
}

words=()
wheels=
while [[ $# -gt 0 ]]; do
  case "$1" in
    --wheels)
      [[ $# -gt 1 && -d "$2" ]] || fail "--wheels wants a folder of wheels${2:+, and $2 is none}"
      wheels="$(cd "$2" && pwd)"
      shift
      ;;
    --cpu) words+=(--cpu) && export RLINF_DEVICE=cpu ;;
    *) words+=("$1") ;;
  esac
  shift
done

python="$(command -v python || command -v python3 || true)"
if [[ -n "$wheels" ]]; then
  ls "$wheels"/*.whl >/dev/null 2>&1 || fail "$wheels holds no wheel; toolkits/setup/wheels.sh fills it"
  PIP_NO_INDEX=1 PIP_FIND_LINKS="$wheels" bash "$root/toolkits/setup/venv.sh" --dev || exit 2
  python="$root/.venv/bin/python"
elif [[ -z "$python" ]] || ! "$python" -c 'import megatron.core, pytest, torch' 2>/dev/null; then
  bash "$root/toolkits/setup/venv.sh" --dev || exit 2
  python="$root/.venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$python" -m rlinf.checks.acceptance "${words[@]}"
