"""Element formats and the bytes they take: the one home of "how large is a value" (no torch)."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}
"""Bits of one value in each plain floating-point format weights and KV cache are stored in."""


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a dense tensor of `shape` (elements per axis) stored as `dtype`."""
    return prod(shape) * BITS[dtype] // 8
