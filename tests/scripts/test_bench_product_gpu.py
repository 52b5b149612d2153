"""The benchmark of products with packed matrices: what it says where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_it_says_so():
    """Exit code 2, and a message that says what is missing and what to do."""
    command = [sys.executable, str(ROOT / "scripts" / "bench_product_gpu.py")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA GPU" in done.stderr
    assert "hint:" in done.stderr
