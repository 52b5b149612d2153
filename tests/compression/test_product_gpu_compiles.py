"""Facts about the compiled kernel of packed products, for which no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexrun.attention.gpu import triton_available
from tests.flexrun.test_kernel_gpu_compiles import SHARED, path_of_modules


@pytest.mark.slow
@pytest.mark.skipif(not triton_available(), reason="Triton is not installed")
def test_kernels_compile_and_fit(tmp_path):
    """Into shared memory and registers, and they ask for codes 16 bytes at a time, ahead."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path_of_modules()}
    environment.pop("TRITON_INTERPRET", None)
    script = str(Path(__file__).with_name("compile_product.py"))
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 36
    for kernel in found:
        assert kernel["shared"] <= SHARED[kernel["capability"]] * 1024, kernel["case"]
        assert kernel["spilled"] <= 64, kernel["case"]
        assert kernel["wide_copies"] >= 9, kernel["case"]
        scales = "bits=4" in kernel["case"] and "float32" not in kernel["case"]
        assert kernel["narrow_copies"] >= (4 if scales else 0), kernel["case"]
