#!/usr/bin/env bash
# Start this node's Ray: RANK=0 the head, RANK=1, 2, ... the others. Twice is once; --stop ends it,
# --status exits with 1 if it has died.
#   start_ray.sh [HEAD_ADDRESS[:PORT]] [--stop | --status]
# The head writes its address to ray_head_ip.txt and a token to ray_token beside this script, where the others find them when the
# folder is shared; otherwise give them HEAD_ADDRESS and copy ray_token. Variables: RANK, HEAD_ADDRESS, RLINF_NIC, RLINF_RAY_PORT,
# RLINF_NUM_GPUS, RLINF_NUM_CPUS, RLINF_OBJECT_STORE_BYTES, RLINF_START_TIMEOUT, RLINF_CLUSTER_ID, RLINF_RAY_STATE (docs/cluster.md).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
export PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$(command -v python || command -v python3)" -m rlinf.cluster.ray_node "$here" "$@"
