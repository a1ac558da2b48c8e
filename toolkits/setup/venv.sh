#!/usr/bin/env bash
# Makes .venv in the checkout, once: venv.sh [--dev]
# Installs the CPU or the GPU set of requirements/, by what the machine has (RLINF_DEVICE=cpu or gpu overrides). A second call with the
# same pins returns at once. An environment that is there already is brought to the pins; a broken one is made anew. With Python 3.12 on a
# GPU machine (Linux, x86-64) versions are those of requirements/gpu.lock. Python is the first of 3.10 to 3.13 that is found, or PYTHON.
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
lock="$root/requirements/gpu.lock"
what=("$root/setup.py" "$root"/rlinf/kernels/c/* "$root"/requirements/*.txt "${BASH_SOURCE[0]}")
if [[ "$device" == gpu ]]; then what+=("$lock"); fi
pins="$(cat "${what[@]}" | sha256sum | cut -c1-16) $device $root"

ready() { # the stamp names the pins; an environment with the dev set serves both
  [[ -f "$stamp" && -x "$venv/bin/rlinf" ]] || return 1
  local have
  have="$(<"$stamp")"
  [[ "$have" == "$pins dev" || ( -z "$dev" && "$have" == "$pins" ) ]]
}

locked=()
compiled=() # on a laptop byte code is made where it is imported, which most of it never is; the nodes of a cluster may not write to the checkout
if [[ "$device" == cpu ]]; then compiled=(--no-compile); fi
pip_install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -qq ${compiled[@]+"${compiled[@]}"} ${locked[@]+"${locked[@]}"} "$@"
}

lock_versions() { # the lock is of one Python and one platform
  if [[ "$device $(uname -sm)" != "gpu Linux x86_64" ]]; then return; fi
  if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then locked=(-c "$lock"); fi
}

find_python() { # Megatron-core and SGLang have no wheels for 3.14
  local name
  for name in ${PYTHON:-python3 python python3.12 python3.13 python3.11 python3.10}; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "no Python from 3.10 to 3.13 found${PYTHON:+ (PYTHON=$PYTHON)}; install one, or name it: PYTHON=/path/to/python3.12"
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
  # A CUDA toolkit has neither cuDNN's headers nor NCCL's, and where there is one the build looks nowhere else: torch came with both.
  local packages
  packages="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia"
  export CPATH="$packages/cudnn/include:$packages/nccl/include${CPATH:+:$CPATH}"
  if pip_install -r "$root/requirements/build.txt" && pip_install --no-build-isolation "$engine"; then return; fi
  fail "pip could not build $engine (its words are above)"
}

install_all() {
  lock_versions
  if [[ "$device" == cpu ]]; then install_cpu_torch; else pip_install "$(torch_pin)"; fi
  say "installing the $device${dev:+ and $dev} requirements"
  # From the requirement files rather than `-e .[gpu]`: Transformer Engine needs torch to be there and no build isolation.
  local wanted=(-r "$root/requirements/base.txt")
  if [[ "$device" == gpu ]]; then
    mapfile -t -O "${#wanted[@]}" wanted < <(sed -nE 's/^((sglang|ray)[^ ]*==[^ ]*).*/\1/p' "$root/requirements/gpu.txt")
  fi
  # What is only for tests comes after the lock: reasoning-gym wants another tabulate than SGLang.
  local tests=(-r "$root/requirements/dev.txt" -r "$root/requirements/rg.txt" -r "$root/requirements/docs.txt")
  if [[ -n "$dev" && "${#locked[@]}" == 0 ]]; then wanted+=("${tests[@]}"); fi
  pip_install "${wanted[@]}" || fail "pip could not install the requirements (its words are above)"
  if [[ -n "$dev" && "${#locked[@]}" != 0 ]]; then
    (locked=() && pip_install "${tests[@]}") || fail "pip could not install the dev requirements (its words are above)"
  fi
  pip_install --no-deps -e "$root" || fail "pip could not install rlinf itself (its words are above)"
  if [[ "$device" == gpu ]]; then install_transformer_engine; fi
}

compile_packages() { # all but the models of transformers, of which a run imports one
  "$venv/bin/python" -m compileall -q -j 0 -x 'transformers/models' "$venv/lib" >/dev/null 2>&1 || true # some test a Python that is yet to come
}

if ready; then exit 0; fi
mkdir -p "$venv" && [[ -w "$root" ]] || fail "$root cannot be written by $(id -un): run this as its owner, or in a checkout of yours"
exec 9>>"$root/.venv.lock" # a file that is open for writing: on NFS only such a lock is seen by other nodes
flock -n 9 || { say "another set-up is at work here; waiting for it" && flock 9; } ||
  fail "the file system of $root has no locks: mount it with -o flock, or use a checkout elsewhere"
if ready; then exit 0; fi
started=$SECONDS
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then make_venv; fi
rm -f "$stamp"
install_all 9<&-
# Where processes may not write byte code, each would compile what it imports anew, and a run has dozens of them.
if [[ "$device" == cpu && -n "${PYTHONDONTWRITEBYTECODE:-}" ]]; then compile_packages 9<&-; fi
printf '%s\n' "$pins${dev:+ $dev}" >"$stamp"
say "done in $((SECONDS - started)) s"
