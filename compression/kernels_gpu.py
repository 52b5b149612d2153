"""The Triton kernel that expands groups of codes on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expand_kernel(
    packed, numbers, out, columns, row_bytes, code_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row and BLOCK of its groups. numbers: the rows as scales and centres are typed.

    A row's last group may be shorter; byte i of n values has the values i and i + ceil(n / 2).
    """
    row = tl.program_id(0).to(tl.int64)
    groups = (columns + GROUP - 1) // GROUP
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = group < groups
    first = (row * row_bytes + code_bytes) // 2
    scale = tl.load(numbers + first + group, mask=there, other=0.0).to(tl.float32)[:, None]
    centre = tl.load(numbers + first + groups + group, mask=there, other=0.0).to(tl.float32)
    centre = centre[:, None]
    count = tl.where(there, tl.minimum(GROUP, columns - group * GROUP), 0)[:, None]
    into = out + row * columns + (group * GROUP)[:, None]
    kind = out.dtype.element_ty
    if BITS == 8:
        at = tl.arange(0, GROUP)[None, :]
        codes = tl.load(
            packed + row * row_bytes + (group * GROUP)[:, None] + at, mask=at < count, other=0
        )
        values = (codes.to(tl.int32) - 128).to(tl.float32) * scale + centre
        tl.store(into + at, values.to(kind), mask=at < count)
    else:
        at = tl.arange(0, GROUP // 2)[None, :]
        half = (count + 1) // 2
        both = tl.load(
            packed + row * row_bytes + (group * (GROUP // 2))[:, None] + at, mask=at < half, other=0
        ).to(tl.int32)
        low = ((both & 15) - 8).to(tl.float32) * scale + centre
        high = ((both >> 4) - 8).to(tl.float32) * scale + centre
        tl.store(into + at, low.to(kind), mask=at < half)
        tl.store(into + half + at, high.to(kind), mask=at < count - half)
