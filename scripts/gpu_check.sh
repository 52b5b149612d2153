#!/usr/bin/env bash
# Runs the tests that need a GPU, and short benchmarks; writes one dated file to scripts/results/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_install.sh"

if ! has_gpu; then
    echo "error: no CUDA device here, so there is nothing to check" >&2
    exit 2
fi
install_project dev
install_demo_model
exec "$VENV/bin/python" "$ROOT/scripts/gpu_check.py" "$@"
