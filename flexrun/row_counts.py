"""How many rows a layer call gets, where every new number of rows costs memory for ever."""

from __future__ import annotations

EXACT_ROWS = 16
"""Up to here any number: one of few, and rows are few enough for each to count."""


def rounded(rows: int) -> int:
    """The next of at most eight counts between two powers of two: at most an eighth is added.

    oneDNN compiles each 16-bit product of a CPU for its number of rows, and keeps what it compiled:
    a quarter of a mebibyte for each count and shape of matrix, with 0.7 ms to make it. A job whose
    sequences end one by one meets hundreds of counts.
    """
    if rows <= EXACT_ROWS:
        return rows
    step = 1 << ((rows - 1).bit_length() - 4)
    return -(-rows // step) * step
