#!/usr/bin/env bash
# Answers eight prompts with a real 135M model whose weights lie on three tiers, then reports.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_install.sh"

install_project demo
install_demo_model
model="$("$VENV/bin/python" "$ROOT/scripts/get_demo_model.py" | tail -n 1)"
output="$ROOT/build/demo"
rm -rf "$output"  # or the job would go on where the last one ended
mkdir -p "$output"

"$VENV/bin/flexrun" generate --model "$model" --input "$ROOT/scripts/demo_prompts.jsonl" \
    --output "$output/results.jsonl" --weights device=25,host=25,disk=50 \
    --max-tokens 48 --temperature 0 "$@" >"$output/report.json"
"$VENV/bin/python" "$ROOT/scripts/show_results.py" \
    "$ROOT/scripts/demo_prompts.jsonl" "$output/results.jsonl" "$output/report.json"
