"""What a machine can do, in bytes and operations per second: measured, or stated."""

from __future__ import annotations

import math
from dataclasses import dataclass

PACKED_ATTENTION = 0.45
"""Bytes per second at which the processor attends to packed pages, over those of plain ones, where
it is not measured: it is bound by compute there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Speeds that the cost model asks for."""

    host_to_device: float
    """Of copies from pinned RAM to the device."""
    host_attention: float = math.inf
    """Bytes of keys and values in RAM that the processor attends to, a row for each sequence."""
    contention: float = 0.0
    """Part of their speed that this attention and the device's compute lose while both work: where
    the device is emulated they share memory and caches."""
    disk_read: float = math.inf
    """Bytes of weights that arrive from disk."""
    swap: float = math.inf
    """Of KV pages, one by one, on their way to the tier of sequences that wait."""
    expansion: float = math.inf
    """Bytes of weights as they are computed with, from those that are stored in another way."""
    matrix_read: float = math.inf
    """Bytes of matrices in products of few rows, which take as long as the device reads them."""
    flops: float = math.inf
    """Of matrix products on the device, with rows enough to be limited by compute."""
