#!/usr/bin/env bash
# Runs the tests: the whole suite, or what pytest's arguments name. Needs no GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_install.sh"

install_project dev
install_demo_model
cd "$ROOT"
if [ $# -eq 0 ]; then
  set -- --numprocesses=logical --maxprocesses=4  # most tests keep one core busy
fi
exec "$VENV/bin/python" -m pytest "$@"
