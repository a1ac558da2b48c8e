#!/usr/bin/env bash
# Makes the environment in which SGLang runs on CPU, once: sglang_cpu.sh
# It lies in $RLINF_CACHE/sglang-cpu (default ~/.cache/rlinf), 2 GB, apart from .venv, which needs nothing of it: the SGLang server runs
# as a child process with this environment's python. A second call with the same pins returns at once. On a machine with a GPU
# requirements/gpu.txt has sglang, and this script is not needed.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
venv="${RLINF_CACHE:-$HOME/.cache/rlinf}/sglang-cpu"
stamp="$venv/rlinf-stamp"
pins_file="$root/requirements/sglang-cpu.txt"
torch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'set-up: %s\n' "$*"; }
fail() {
  printf 'set-up: error: %s\n' "$*" >&2
  exit 2
}

[[ $# -eq 0 ]] || fail "unknown argument $1; usage: sglang_cpu.sh"

find_python() { # the version that SGLang's wheel is pinned with
  local name
  for name in ${PYTHON:-"$root/.venv/bin/python" python3.11 python3 python}; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "SGLang on CPU is pinned for Python 3.11, and there is none${PYTHON:+ (PYTHON=$PYTHON)}; install it, or name it: PYTHON=/path/to/python3.11"
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -qq --no-deps "$@"; }

install_all() {
  local torch_build site
  torch_build="$(sed -nE 's/^(torch==[0-9.]+).*/\1/p' "$pins_file")+cpu"
  pip_install "$torch_build" 2>/dev/null || pip_install "$torch_build" --extra-index-url "$torch_cpu_index" ||
    fail "pip could not install $torch_build (its words are above)"
  grep -v '^torch==' "$pins_file" >"$venv/rlinf-pins.txt"
  pip_install -r "$venv/rlinf-pins.txt" || fail "pip could not install requirements/sglang-cpu.txt (its words are above)"
  site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
  cp "$here"/sglang_cpu/*.py "$site/"
  echo 'import rlinf_sglang_cpu' >"$site/rlinf_sglang_cpu.pth"
  "$venv/bin/python" -c 'import sglang.srt.server_args' >/dev/null 2>"$venv/rlinf-import.log" ||
    fail "sglang does not import in $venv; see $venv/rlinf-import.log"
}

pins="$(cat "$pins_file" "$here"/sglang_cpu/*.py "${BASH_SOURCE[0]}" | sha256sum | cut -c1-16)"
mkdir -p "$venv"
exec 9<"$here"
flock -n 9 || { say "another set-up is at work here; waiting for it" && flock 9; }
if [[ -f "$stamp" && "$(<"$stamp")" == "$pins" ]]; then exit 0; fi
started=$SECONDS
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python="$(find_python)"
  say "making $venv with $("$python" --version)"
  find "$venv" -mindepth 1 -delete
  "$python" -m venv "$venv" >/dev/null || fail "cannot make a virtual environment with $python; on Debian and Ubuntu: apt install python3-venv"
fi
rm -f "$stamp"
say "installing SGLang for CPU (400 MB to load; a few minutes the first time)"
install_all 9<&-
printf '%s\n' "$pins" >"$stamp"
say "done in $((SECONDS - started)) s"
