#!/usr/bin/env bash
# Runs what must hold before a commit, besides the tests: lint, format, types, layout rules.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_install.sh"

install_project dev
cd "$ROOT"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
"$VENV/bin/python" -m pytest --quiet --durations=0 --durations-min=5 tests/test_layout.py
