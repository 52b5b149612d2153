"""Triton kernels that multiply rows with matrices of codes, which no memory holds expanded.

Values are made in registers, and rounded as those that are expanded: all rows see the same weights.
The other way is products of the codes themselves, times scales, and sums of rows, times centres.
"""

from __future__ import annotations

import triton
import triton.language as tl

BITS_OF_2_23 = tl.constexpr(0x4B000000)
"""Of a float32, whose last bits count ones: a small integer joins them without a conversion."""


@triton.jit
def _columns(GROUP: tl.constexpr, BYTES: tl.constexpr, BLOCK_G: tl.constexpr):
    """Columns, from a group's first on, of the (low) codes of BLOCK_G groups' bytes."""
    byte = tl.arange(0, BLOCK_G * BYTES)
    return byte // BYTES, byte // BYTES * GROUP + byte % BYTES


@triton.jit
def _values(both, scale, centre, BITS: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr):
    """What bytes [outputs, groups, bytes] stand for, as [outputs, SIZE]: low codes, high codes.

    Of 8 bits there are no high ones. Groups are an axis, so that a scale is loaded once for all.
    """
    outputs: tl.constexpr = both.shape[0]
    both = both.to(tl.int32) | BITS_OF_2_23
    scale, centre = scale.to(tl.float32)[:, :, None], centre.to(tl.float32)[:, :, None]
    if BITS == 8:
        code = both.to(tl.float32, bitcast=True)
        low = ((code - 8388736.0) * scale + centre).to(KIND)  # 2^23, and the code of the centre
        low = tl.reshape(low, [outputs, SIZE])
        return low, low
    code = (both & (BITS_OF_2_23 | 0xF)).to(tl.float32, bitcast=True)
    low = ((code - 8388616.0) * scale + centre).to(KIND)
    code = (both & (BITS_OF_2_23 | 0xF0)).to(tl.float32, bitcast=True)
    high = ((code - 8388736.0) * (scale * 0.0625) + centre).to(KIND)  # 16 times: not shifted
    return tl.reshape(low, [outputs, SIZE]), tl.reshape(high, [outputs, SIZE])


@triton.jit(do_not_specialize=["rows", "steps"])
def product_kernel(
    x, packed, numbers, bias, out, rows, outputs, steps, x_row, groups, row_bytes, code_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr, GROUPS_BY: tl.constexpr, ROW_BY: tl.constexpr, BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of BLOCK_M rows, over the groups that `steps` of BLOCK_G of them are.

    numbers: `packed` as scales and centres are typed. A row's `groups` and `row_bytes` are given
    divided by GROUPS_BY and ROW_BY: so the compiler knows that they are multiples of these, and how
    much it may load at a time. Each number along the grid's last axis gives sums of its own steps;
    out [those, rows, outputs] is of float32 if there are several. UPCAST: products are of float32.
    """
    bytes_of_group: tl.constexpr = GROUP * BITS // 8
    size: tl.constexpr = BLOCK_G * bytes_of_group
    kind: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    precision: tl.constexpr = "ieee" if kind == tl.float32 else "tf32"
    groups, row_bytes = groups * GROUPS_BY, row_bytes * ROW_BY
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    first = part * steps * BLOCK_G
    # More than all rows of the matrix: the last one again, so that no load needs a mask for it.
    start = tl.minimum(output, outputs - 1).to(tl.int64) * row_bytes
    block = tl.arange(0, BLOCK_G)
    place = block[None, :, None] * bytes_of_group + tl.arange(0, bytes_of_group)[None, None, :]
    code_at = packed + start[:, None, None] + place
    number_at = numbers + ((start + code_bytes) // 2)[:, None] + block[None, :]
    of_group, column = _columns(GROUP, bytes_of_group, BLOCK_G)
    x_at = x + m.to(tl.int64)[None, :] * x_row + column[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for group in range(first, tl.minimum(first + steps * BLOCK_G, groups), BLOCK_G):
        left = groups - group
        held = (block < left)[None, :]
        both = tl.load(code_at + group * bytes_of_group, mask=held[:, :, None], other=0)
        scale = tl.load(number_at + group, mask=held, other=0.0)
        centre = tl.load(number_at + groups + group, mask=held, other=0.0)
        real = (of_group < left)[:, None] & (m < rows)[None, :]
        low, high = _values(both, scale, centre, BITS, kind, size)
        mine = tl.load(x_at + group * GROUP, mask=real, other=0.0).to(kind)
        acc = tl.dot(low, mine, acc, input_precision=precision)
        if BITS == 4:
            mine = tl.load(x_at + group * GROUP + GROUP // 2, mask=real, other=0.0).to(kind)
            acc = tl.dot(high, mine, acc, input_precision=precision)
    if BIAS:
        acc += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
    into = out + (part * rows + m).to(tl.int64)[None, :] * outputs + output[:, None]
    real = (output < outputs)[:, None] & (m < rows)[None, :]
    tl.store(into, acc.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(
    parts, bias, out, rows, outputs, PARTS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Adds up PARTS sums [PARTS, rows, outputs], always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = output < outputs
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + (part * rows + row) * outputs + output, mask=there, other=0.0)
    if BIAS:
        total += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + output, total.to(out.dtype.element_ty), mask=there)


INTERPRETED = not isinstance(product_kernel, triton.JITFunction)
"""Triton's interpreter runs the kernels, on the CPU."""
