"""Where the parts of a row of codes are, and its scales and centres as vectors.

A row is [codes | scales | centres], in groups of neighbours: see `GroupFormat`.
"""

from __future__ import annotations

from typing import Any

from compression import code_vectors as codes
from compression.compiled import part


@part
def halves(at: Any, dim: Any, size: Any) -> Any:
    """Of the group at `at`: its bytes, and those with two values."""
    count = min(size, dim - at)
    return (count + 1) // 2, count // 2


@part
def code_bytes(dim: Any) -> Any:
    return (dim + 3) // 4 * 2


@part
def row_bytes(dim: Any, size: Any) -> Any:
    """See `GroupFormat.row_bytes`."""
    return code_bytes(dim) + (dim + size - 1) // size * 4


@part
def numbers_of(
    cells: Any, scales: Any, groups: Any, step: Any, t: Any, last: Any, half: Any
) -> Any:
    """A group's scale and centre of four rows, each in four lanes; its scale is at `scales`.

    Words of 32 bits are loaded: one with the scale in its low half, one with the centre in its high
    one. Both are inside of the row.
    """
    a, b = scales + t * step, scales + min(t + 1, last) * step
    c, d = scales + min(t + 2, last) * step, scales + min(t + 3, last) * step
    low, more = codes.load_words(cells, a, b, c, d), 2 * groups - 2
    high = codes.load_words(cells, a + more, b + more, c + more, d + more)
    if half:
        return codes.low_float16(low), codes.high_float16(high)
    return codes.low_bfloat16(low), codes.high_bfloat16(high)
