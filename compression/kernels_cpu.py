"""Entry points of group quantization on the CPU: jobs whose rows are shared among threads.

A job is a table of int64: next share, shares, finished shares, rows, columns, bytes of a packed
row, bits, group, the type of scales (0 bfloat16, 1 float16; or `FLOAT8`, `FLOAT4`), the addresses
of packed rows and of values, and of which `SHARES` the search for codes begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numba import carray, types

from compression.compiled import (
    callback,
    compiled_from,
    count_up,
    kernel,
    part,
    pointer_to,
    stamp_of,
)
from compression.expand_cpu import expansion
from compression.number_bits import bfloat16_of
from compression.quantize_cpu import quantize_rows
from compression.vectors import LANES

JOB = 12
"""Numbers of a job."""
FINISHED, PACKED, VALUES = 2, 9, 10
"""Places in it."""
_bytes, _uint16s = pointer_to(types.uint8), pointer_to(types.uint16)
_floats = pointer_to(types.float32)


@part
def _same(value: Any) -> Any:
    return value


def _shares(rows_of: Any, values_of: Any) -> Any:
    """A kernel that does `rows_of` for shares of a job; `values_of`: the pointer to its values."""

    @kernel
    def _take_shares(job: Any) -> None:
        shares, rows, columns, row_bytes = job[1], job[3], job[4], job[5]
        bits, group, half, every = job[6], job[7], job[8], job[11]
        blocks = (rows + LANES - 1) // LANES
        packed = carray(_bytes(job[PACKED]), (rows, row_bytes))
        numbers = carray(_uint16s(job[PACKED]), (rows, row_bytes // 2))
        values = carray(values_of(job[VALUES]), (rows, columns))
        while True:
            share = count_up(job, 0)
            if share >= shares:
                return
            first = blocks * share // shares * LANES  # whole blocks: see `quantize_rows`
            mine = slice(first, min(rows, blocks * (share + 1) // shares * LANES))
            rows_of(packed[mine], numbers[mine], columns, bits, group, half, values[mine], every)
            count_up(job, FINISHED)

    return _take_shares


_take_quantize = _shares(quantize_rows, _floats)
_take_expand_float32 = _shares(expansion(_same), _floats)
_take_expand_bfloat16 = _shares(expansion(bfloat16_of), _uint16s)


def _callbacks(stamp: int) -> tuple[Any, Any, Any]:
    """Entry points: quantize, expand to float32, expand to bfloat16; see `compiled_from`."""

    @callback
    def on_quantize(data: Any) -> None:
        compiled_from(stamp)
        _take_quantize(carray(data, JOB))

    @callback
    def on_expand_float32(data: Any) -> None:
        compiled_from(stamp)
        _take_expand_float32(carray(data, JOB))

    @callback
    def on_expand_bfloat16(data: Any) -> None:
        compiled_from(stamp)
        _take_expand_bfloat16(carray(data, JOB))

    return on_quantize, on_expand_float32, on_expand_bfloat16


QUANTIZE, EXPAND_FLOAT32, EXPAND_BFLOAT16 = _callbacks(stamp_of(Path(__file__).parent))
