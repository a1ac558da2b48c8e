#!/usr/bin/env bash
# Wait until at least N devices (GPUs, or CPU slots where no node has a GPU) are alive; names nodes that are dead or missing.
#   check_ray.sh N [--timeout SECONDS]        exit code 0: they are; 1: time-out; 2: no cluster here
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$(command -v python || command -v python3)" -m rlinf.cluster.ray_check "$@"
