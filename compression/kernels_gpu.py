"""The Triton kernel that expands groups of codes on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expand_kernel(
    packed, numbers, out, columns, row_bytes, code_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    FLOAT8: tl.constexpr,
):  # fmt: skip
    """One row and BLOCK of its groups. numbers: the rows as scales and centres are typed.

    Unless all are WHOLE, a row's last group may be shorter; byte i of n values has the values i and
    i + ceil(n / 2).
    """
    row = tl.program_id(0).to(tl.int64)
    groups = (columns + GROUP - 1) // GROUP
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = group < groups
    if FLOAT8:  # two halves of a float32: rows need not begin on a multiple of 4 bytes
        first = (row * row_bytes + code_bytes) // 2 + 2 * group
        low = tl.load(numbers + first, mask=there, other=0).to(tl.int32) & 0xFFFF
        high = tl.load(numbers + first + 1, mask=there, other=0).to(tl.int32) << 16
        scale = (low | high).to(tl.float32, bitcast=True)[:, None]
    else:
        first = (row * row_bytes + code_bytes) // 2 + group
        scale = tl.load(numbers + first, mask=there, other=0.0).to(tl.float32)[:, None]
        centre = tl.load(numbers + first + groups, mask=there, other=0.0).to(tl.float32)[:, None]
    group = group[:, None]
    there = there[:, None]
    into = out + row * columns + group * GROUP
    codes = packed + row * row_bytes + group * (GROUP * BITS // 8)
    kind = out.dtype.element_ty
    count = tl.minimum(GROUP, columns - group * GROUP)
    if BITS == 8:
        at = tl.arange(0, GROUP)[None, :]
        held = there if WHOLE else there & (at < count)
        code = tl.load(codes + at, mask=held, other=0).to(tl.int32)
        if FLOAT8:
            # As a float16 such a code is 2^8 too small.
            bits = ((code & 0x80) << 8 | (code & 0x7F) << 7).to(tl.int16)
            values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256 * scale
        else:
            values = (code - 128).to(tl.float32) * scale + centre
        tl.store(into + at, values.to(kind), mask=held)
    else:
        at = tl.arange(0, GROUP // 2)[None, :]
        half = GROUP // 2 if WHOLE else (count + 1) // 2
        held = there if WHOLE else there & (at < half)
        both = tl.load(codes + at, mask=held, other=0).to(tl.int32)
        low = ((both & 15) - 8).to(tl.float32) * scale + centre
        high = ((both >> 4) - 8).to(tl.float32) * scale + centre
        tl.store(into + at, low.to(kind), mask=held)
        held = there if WHOLE else there & (at < count - half)
        tl.store(into + half + at, high.to(kind), mask=held)
