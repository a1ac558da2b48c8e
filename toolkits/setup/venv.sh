#!/usr/bin/env bash
# Makes .venv in the checkout, once: venv.sh [--dev]
# Installs the CPU or the GPU set of requirements/, by what the machine has (RLINF_DEVICE=cpu or gpu overrides). A second call with the
# same pins returns at once. An environment that is there already is brought to the pins; a broken one is made anew.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="$root/.venv"
stamp="$venv/rlinf-stamp"
torch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'set-up: %s\n' "$*"; }
fail() {
  printf 'set-up: error: %s\n' "$*" >&2
  exit 2
}

dev=
for word in "$@"; do
  case "$word" in
    --dev) dev=dev ;;
    *) fail "unknown argument $word; usage: venv.sh [--dev]" ;;
  esac
done

device="${RLINF_DEVICE:-}"
if [[ -z "$device" ]]; then
  device=cpu
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then device=gpu; fi
fi
[[ "$device" == cpu || "$device" == gpu ]] || fail "RLINF_DEVICE is '$device'; it must be cpu or gpu"

# Everything that decides what is installed, and where (console scripts name the folder).
pins="$(cat "$root/setup.py" "$root"/rlinf/cpu/* "$root"/requirements/*.txt "${BASH_SOURCE[0]}" | sha256sum | cut -c1-16) $device $root"

ready() { # the stamp names the pins; an environment with the dev set serves both
  [[ -f "$stamp" && -x "$venv/bin/rlinf" ]] || return 1
  local have
  have="$(<"$stamp")"
  [[ "$have" == "$pins dev" || ( -z "$dev" && "$have" == "$pins" ) ]]
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -qq "$@"; }

find_python() {
  local name
  for name in ${PYTHON:-python3 python python3.14 python3.13 python3.12 python3.11 python3.10}; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "no Python 3.10 or newer found${PYTHON:+ (PYTHON=$PYTHON)}; install one, or name it: PYTHON=/path/to/python3"
}

make_venv() {
  local python
  python="$(find_python)"
  say "making $venv with $("$python" --version)"
  find "$venv" -mindepth 1 -delete 2>/dev/null || true
  "$python" -m venv "$venv" >/dev/null 2>&1 && return
  # Some distributions ship venv without ensurepip; a recent pip can fill the environment from outside.
  if "$python" -m venv --without-pip "$venv" && "$python" -m pip --python "$venv/bin/python" install -qq pip; then return; fi
  fail "cannot make a virtual environment with $python; on Debian and Ubuntu: apt install python3-venv"
}

torch_pin() { sed -nE 's/^(torch==[0-9.]+).*/\1/p' "$root/requirements/base.txt"; }

install_cpu_torch() { # PyPI's Linux build drags several GB of CUDA along
  local build
  build="$(torch_pin)"
  if [[ "$(uname -s)" == Linux ]]; then build="$build+cpu"; fi
  say "installing $build (200 MB; all of it takes a few minutes the first time)"
  # First from where pip looks anyway (a mirror or a local folder may have it), then from PyTorch's own index.
  pip_install "$build" 2>/dev/null || pip_install "$build" --extra-index-url "$torch_cpu_index" ||
    fail "pip could not install $build (its words are above)"
}

install_transformer_engine() { # builds against the torch that is there; the actor has layers that do without it
  local engine
  engine="$(sed -nE 's/^(transformer-engine[^ ]*).*/\1/p' "$root/requirements/gpu.txt")"
  if ! command -v nvcc >/dev/null; then
    say "no nvcc here: Transformer Engine is left out; the actor does without it"
    return
  fi
  say "building $engine (this takes minutes)"
  if pip_install -r "$root/requirements/build.txt" && pip_install --no-build-isolation "$engine"; then return; fi
  fail "pip could not build $engine (its words are above)"
}

install_all() {
  if [[ "$device" == cpu ]]; then install_cpu_torch; else pip_install "$(torch_pin)"; fi
  say "installing the $device${dev:+ and $dev} requirements"
  # From the requirement files rather than `-e .[gpu]`: Transformer Engine needs torch to be there and no build isolation.
  local wanted=(-r "$root/requirements/base.txt")
  if [[ -n "$dev" ]]; then wanted+=(-r "$root/requirements/dev.txt" -r "$root/requirements/rg.txt" -r "$root/requirements/docs.txt"); fi
  if [[ "$device" == gpu ]]; then wanted+=("$(sed -nE 's/^(sglang==[^ ]*).*/\1/p' "$root/requirements/gpu.txt")"); fi
  pip_install "${wanted[@]}" || fail "pip could not install the requirements (its words are above)"
  pip_install --no-deps -e "$root" || fail "pip could not install rlinf itself (its words are above)"
  if [[ "$device" == gpu ]]; then install_transformer_engine; fi
}

mkdir -p "$venv"
exec 9<"$root"
flock -n 9 || { say "another set-up is at work here; waiting for it" && flock 9; }
if ready; then exit 0; fi
started=$SECONDS
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then make_venv; fi
rm -f "$stamp"
install_all 9<&-
printf '%s\n' "$pins${dev:+ $dev}" >"$stamp"
say "done in $((SECONDS - started)) s"
