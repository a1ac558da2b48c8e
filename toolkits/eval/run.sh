#!/usr/bin/env bash
# Score models on every benchmark file of a folder: run.sh DATA_DIR MODEL_DIR [MODEL_DIR ...] [key=value ...]
# DATA_DIR holds what `rlinf data convert` made: aime24.jsonl, aime25.jsonl, gpqa_diamond.jsonl, math500.jsonl, gsm8k.jsonl, or some of them.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [[ -f "$root/.venv/bin/activate" ]]; then
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
fi
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [[ $# -lt 2 || ! -d "$1" ]]; then
  echo "run.sh: give a folder of benchmark files and at least one model folder: run.sh DATA_DIR MODEL_DIR [key=value ...]" >&2
  exit 2
fi
data="$(cd "$1" && pwd)"
shift

paths=()
for name in aime24 aime25 gpqa_diamond math500 gsm8k; do
  [[ -f "$data/$name.jsonl" ]] && paths+=("evaluation.$name.path=$data/$name.jsonl")
done
if [[ ${#paths[@]} -eq 0 ]]; then
  echo "run.sh: $data holds no benchmark file such as aime24.jsonl; make it with \`rlinf data convert\`" >&2
  exit 2
fi
exec "$(command -v python || command -v python3)" -m rlinf eval "${paths[@]}" "$@"
