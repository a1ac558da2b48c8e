#!/usr/bin/env bash
# The same as ../run_main_math_grpo_megatron.sh: the path that the users' documentation names.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_main_math_grpo_megatron.sh" "$@"
