"""Facts about the compiled Triton kernels, for which no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexrun.attention.gpu import triton_available

ROOT = Path(__file__).resolve().parents[2]
SHARED = {80: 163, 86: 99, 90: 227}
"""KB of shared memory that a program may have, on A100, RTX and H100."""


def compiled(script: Path, cache: Path) -> list[dict[str, Any]]:
    """What `script` prints of each kernel; all fit into shared memory."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for kernel in found:
        assert kernel["shared"] <= SHARED[kernel["capability"]] * 1024, kernel["case"]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not triton_available(), reason="Triton is not installed")
def test_kernels_compile_and_fit(tmp_path):
    """Kernels of all head sizes fit into shared memory, and ask for many bytes at a time, ahead."""
    found = compiled(Path(__file__).with_name("compile_kernels.py"), tmp_path)
    assert len(found) == 84
    for kernel in found:
        assert kernel["wide_copies"] >= 4, kernel["case"]
