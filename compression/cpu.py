"""Group quantization where the CPU computes: rows shared out among torch's threads."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compression import groupwise
from compression.crew import Crew
from compression.expand_cpu import FLOAT4, FLOAT8
from compression.kernels_cpu import (
    EXPAND_BFLOAT16,
    EXPAND_FLOAT32,
    FINISHED,
    QUANTIZE,
)
from compression.vectors import LANES

if TYPE_CHECKING:
    from collections.abc import Callable

    from compression.spec import GroupFormat

_EXPANSIONS = {torch.float32: EXPAND_FLOAT32, torch.bfloat16: EXPAND_BFLOAT16}
_NUMBERS = {"bfloat16": 0, "float16": 1, "float32": FLOAT8, "e8m0": FLOAT4}
_VALUES = 1 << 22
"""That are there as float32 at a time."""
_SHARE_BYTES = 64 * 1024
"""Least packed bytes of a share, …"""
_SHARES = 4
"""… of which there are so many for each thread: one that is held up takes fewer."""


def quantize(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """As `groupwise.quantize` does it, sums of floats apart. Raises `QuantizationError`."""
    packed = _quantized(values, spec, groupwise.refuse_unusable, every=1)
    groupwise.refuse_unbounded(packed, spec, values.shape[1])
    return packed


def quantize_unchecked(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """As `groupwise.quantize_any` does it, sums of floats apart."""
    return _quantized(values, spec, lambda _: None, groupwise.EVERY)


def _quantized(
    values: torch.Tensor, spec: GroupFormat, refuse: Callable[[torch.Tensor], None], every: int
) -> torch.Tensor:
    rows, columns = values.shape
    packed = torch.empty(rows, spec.row_bytes(columns), dtype=torch.uint8)
    step = max(LANES, _VALUES // columns // LANES * LANES)
    for some, target in zip(values.split(step), packed.split(step)):
        floats = some.float().contiguous()
        refuse(floats)
        _run(QUANTIZE, target, floats, spec, every)
    return packed


def expand(packed: torch.Tensor, spec: GroupFormat, out: torch.Tensor) -> None:
    """Fill `out` [rows, columns] from packed rows; both are contiguous."""
    expansion = _EXPANSIONS.get(out.dtype)
    short = spec.float4 and out.shape[1] % spec.group
    if expansion is None or short:
        groupwise.expand_into(packed, spec, out)
    else:
        _run(expansion, packed, out, spec)


def _run(
    callback: Any, packed: torch.Tensor, values: torch.Tensor, spec: GroupFormat, every: int = 1
) -> None:
    rows, columns = values.shape
    assert packed.is_contiguous()
    assert values.is_contiguous()
    threads = torch.get_num_threads()
    shares = max(1, min(_SHARES * threads, -(-rows // LANES), packed.nbytes // _SHARE_BYTES))
    sizes = [0, shares, 0, rows, columns, spec.row_bytes(columns)]
    kind = [spec.bits, spec.group, _NUMBERS[spec.numbers]]
    job = np.array([*sizes, *kind, packed.data_ptr(), values.data_ptr(), every], np.int64)
    _crew(threads).run(
        callback, ctypes.cast(job.ctypes.data, ctypes.POINTER(ctypes.c_int64)), shares
    )
    if job[FINISHED] != shares:  # compiled code cannot raise through OpenMP
        raise MemoryError("no memory to quantize or expand a group")


@functools.cache
def _crew(threads: int) -> Crew:
    return Crew(threads)
