"""The Triton kernel that expands groups of codes on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expand_kernel(
    packed, numbers, out, columns, row_bytes, code_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One row and BLOCK of its groups. numbers: the rows as scales and centres are typed.

    Unless all are WHOLE, a row's last group may be shorter; byte i of n values has the values i and
    i + ceil(n / 2).
    """
    row = tl.program_id(0).to(tl.int64)
    groups = (columns + GROUP - 1) // GROUP
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = group < groups
    first = (row * row_bytes + code_bytes) // 2
    scale = tl.load(numbers + first + group, mask=there, other=0.0).to(tl.float32)[:, None]
    centre = tl.load(numbers + first + groups + group, mask=there, other=0.0).to(tl.float32)
    centre = centre[:, None]
    group = group[:, None]
    there = there[:, None]
    into = out + row * columns + group * GROUP
    codes = packed + row * row_bytes + group * (GROUP * BITS // 8)
    kind = out.dtype.element_ty
    count = tl.minimum(GROUP, columns - group * GROUP)
    if BITS == 8:
        at = tl.arange(0, GROUP)[None, :]
        held = there if WHOLE else there & (at < count)
        values = (tl.load(codes + at, mask=held, other=0).to(tl.int32) - 128).to(tl.float32)
        tl.store(into + at, (values * scale + centre).to(kind), mask=held)
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
