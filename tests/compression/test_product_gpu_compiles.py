"""Facts about the compiled kernel of packed products, for which no GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexrun.attention.gpu import triton_available
from tests.flexrun.test_kernel_gpu_compiles import compiled


@pytest.mark.slow
@pytest.mark.skipif(not triton_available(), reason="Triton is not installed")
def test_kernels_compile_and_fit(tmp_path):
    """Into shared memory and registers, and they ask for codes 16 bytes at a time, ahead."""
    found = compiled(Path(__file__).with_name("compile_product.py"), tmp_path)
    assert len(found) == 36
    for kernel in found:
        assert kernel["spilled"] <= 64, kernel["case"]
        assert kernel["wide_copies"] >= 9, kernel["case"]
        scales = "bits=4" in kernel["case"] and "float32" not in kernel["case"]
        assert kernel["narrow_copies"] >= (4 if scales else 0), kernel["case"]
