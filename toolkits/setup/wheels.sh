#!/usr/bin/env bash
# Fills a folder with a wheel of everything that venv.sh --dev installs, for machines without internet: wheels.sh DIR
# Run it where there is internet, on a machine of the same kind: system, Python, GPU and nvcc or none. What has only source on PyPI is built
# here (Transformer Engine), or fetched by its own build step (cuda-tile, from NVIDIA's index). On the other machine:
#   PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR bash toolkits/setup/venv.sh --dev, or toolkits/gpu_acceptance.sh --wheels DIR
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
fail() {
  printf 'wheels: error: %s\n' "$*" >&2
  exit 2
}

[[ $# -eq 1 && "$1" != -* ]] || fail "usage: wheels.sh DIR"
mkdir -p "$1" && [[ -w "$1" ]] || fail "$1 cannot be written by $(id -un)"
wheels="$(cd "$1" && pwd)"

bash "$root/toolkits/setup/venv.sh" --dev || exit 2
python="$root/.venv/bin/python"
"$python" -m pip freeze --exclude-editable >"$wheels/installed.txt"
# Under the lock (venv.sh says where) what is for tests may have displaced a version that is installed before it.
"$python" - "$wheels/installed.txt" "$root/requirements/gpu.lock" >"$wheels/locked.txt" <<'END'
import re, sys

lines = [[line.split("#")[0].strip().partition("==") for line in open(file) if line[0] not in "#\n"] for file in sys.argv[1:]]
installed, locked = ({re.sub("[-_.]+", "-", name).lower(): version for name, _, version in found} for found in lines)
if "sglang" in installed and sys.version_info[:2] == (3, 12):
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in locked.items() if installed.get(name, version) != version)
END

pip_wheel() {
  "$python" -m pip wheel --disable-pip-version-check -q -w "$wheels" "$@"
}
gather() { # what words of pip
  local what="$1"
  shift
  pip_wheel "$@" || fail "pip could not gather $what (its words are above)"
}

# With the build tools in the environment nothing is built against another torch than the one that is there.
"$python" -m pip install --disable-pip-version-check -q -r "$root/requirements/build.txt" || fail "pip could not install the build tools"
gather "the build tools" -r "$root/requirements/build.txt"
torch="$(grep '^torch==.*+cpu$' "$wheels/installed.txt" || true)" # of PyTorch's own index, if not of where pip looks anyway
if [[ -n "$torch" ]]; then
  pip_wheel --no-deps "$torch" 2>/dev/null || gather "$torch" --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
  sed -i '/^torch==/d' "$wheels/installed.txt"
fi
gather "what is installed" --no-deps --no-build-isolation -r "$wheels/installed.txt"
if [[ -s "$wheels/locked.txt" ]]; then gather "the versions of the lock" --no-deps --no-build-isolation -r "$wheels/locked.txt"; fi
printf 'wheels: %s in %s\n' "$(find "$wheels" -name '*.whl' | wc -l)" "$wheels"
