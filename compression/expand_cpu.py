"""The loops that expand codes on the CPU, for Numba to compile; `groupwise.expand` in short."""

from __future__ import annotations

from typing import Any

import numpy as np

from compression.compiled import part
from compression.float4_cpu import expand_float4
from compression.number_bits import F, joined, number, widened_half

FLOAT8, FLOAT4 = 2, 3
"""Instead of whether numbers are float16: codes are floats."""


def expansion(stored: Any) -> Any:
    """The kernel that expands rows to what `stored` makes of float32."""
    expand_rows = _rows(stored)

    @part
    def _expand_rows(
        packed: Any, numbers: Any, columns: Any, bits: Any, group: Any, half: Any, out: Any, _: Any
    ) -> None:
        """packed: uint8 [rows, row bytes], numbers: the same as uint16, out: [rows, columns].

        A row of floats of 4 bits may have an odd number of bytes: they have no use for `numbers`.
        """
        if half != FLOAT4:
            expand_rows(packed, numbers, columns, bits, group, half, out)
            return
        for row in range(packed.shape[0]):
            expand_float4(packed[row], columns, out[row])

    return _expand_rows


def _rows(stored: Any) -> Any:
    """For all but floats of 4 bits."""
    expand_any, expand_bytes = _any_length(stored), _whole_bytes(stored)
    expand_floats = _floats(stored)

    @part
    def _expand_rows(
        packed: Any, numbers: Any, columns: Any, bits: Any, group: Any, half: Any, out: Any
    ) -> None:
        groups = (columns + group - 1) // group
        first = packed.shape[1] // 2 - 2 * groups
        for row in range(packed.shape[0]):
            of_row = numbers[row, first:]
            for each in range(groups):
                at = each * group
                count = min(group, columns - at)
                codes, into = packed[row, at * bits // 8 :], out[row, at:]
                if half == FLOAT8:
                    scale = joined(of_row[2 * each], of_row[2 * each + 1])
                    expand_floats(codes, scale, count, into)
                    continue
                scale, centre = number(of_row[each], half), number(of_row[groups + each], half)
                if bits == 8:
                    expand_bytes(codes, scale, centre, count, into)
                elif count == 64:  # loops of known length become vectors with nothing around them
                    expand_any(codes, scale, centre, 64, into)
                elif count == 32:
                    expand_any(codes, scale, centre, 32, into)
                elif count == 128:
                    expand_any(codes, scale, centre, 128, into)
                else:
                    expand_any(codes, scale, centre, count, into)

    return _expand_rows


def _floats(stored: Any) -> Any:
    """For `count` codes that are floats of 8 bits.

    As a float16 such a code is 2^8 too small: its exponent is counted from 7 and not from 15.
    """

    @part
    def _expand(codes: Any, scale: Any, count: Any, out: Any) -> None:
        for i in range(count):
            code = np.int32(codes[i])
            sign, size = code & np.int32(0x80), code & np.int32(0x7F)
            half = np.uint16(sign << np.int32(8) | size << np.int32(7))
            out[i] = stored(widened_half(half) * F(256) * scale)

    return _expand


def _any_length(stored: Any) -> Any:
    """For `count` codes of 4 bits."""

    @part
    def _expand(codes: Any, scale: Any, centre: Any, count: Any, out: Any) -> None:
        half = (count + 1) // 2
        for i in range(half):
            low = np.int32(codes[i]) & np.int32(15)
            out[i] = stored(F(low - np.int32(8)) * scale + centre)
        for i in range(count - half):
            high = np.int32(codes[i]) >> np.int32(4)
            out[i + half] = stored(F(high - np.int32(8)) * scale + centre)

    return _expand


def _whole_bytes(stored: Any) -> Any:
    """For `count` codes of 8 bits."""

    @part
    def _expand(codes: Any, scale: Any, centre: Any, count: Any, out: Any) -> None:
        for i in range(count):
            out[i] = stored(F(np.int32(codes[i]) - np.int32(128)) * scale + centre)

    return _expand
