"""The Triton kernels that expand groups of codes on a GPU, and that choose them."""

from __future__ import annotations

import triton
import triton.language as tl

from compression.groupwise import LARGEST as _LARGEST

LARGEST = tl.constexpr(_LARGEST)


@triton.jit
def _values(code, scale, centre, FLOAT4: tl.constexpr):
    """Of codes of 4 bits. As a float16 one that is a float is 2^14 too small."""
    if FLOAT4:
        bits = ((code & 8) << 12 | (code & 7) << 9).to(tl.int16)
        values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384 * scale
    else:
        values = (code - 8).to(tl.float32) * scale + centre
    return values


@triton.jit
def expand_kernel(
    packed, numbers, out, columns, row_bytes, code_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    FLOAT8: tl.constexpr, FLOAT4: tl.constexpr,
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
        centre = 0.0
    elif FLOAT4:  # a byte, of which 0 is the power of two that is not normal
        power = tl.load(numbers + row * row_bytes + code_bytes + group, mask=there, other=1)
        power = power.to(tl.int32)
        power = tl.where(power == 0, 1 << 22, power << 23)
        scale = power.to(tl.float32, bitcast=True)[:, None]
        centre = 0.0
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
        low = _values(both & 15, scale, centre, FLOAT4)
        high = _values(both >> 4, scale, centre, FLOAT4)
        tl.store(into + at, low.to(kind), mask=held)
        held = there if WHOLE else there & (at < count - half)
        tl.store(into + half + at, high.to(kind), mask=held)


@triton.jit
def _improved(
    x, there, count, scale, centre, total,
    BITS: tl.constexpr, LEAST_SPREAD: tl.constexpr,
):  # fmt: skip
    """See `groupwise._improved`; x [rows, group], the others [rows]; what is not `there` is 0."""
    zero: tl.constexpr = 1 << (BITS - 1)
    step = tl.where(scale > 0.0, 1.0 / tl.where(scale > 0.0, scale, 1.0), 0.0)
    codes = tl.floor(x * step[:, None] + (0.5 - centre * step)[:, None])
    codes = tl.where(there, tl.minimum(tl.maximum(codes, -zero), zero - 1), 0.0)
    added = tl.sum(codes, 1)
    mean = added / count
    spread = tl.sum(codes * codes, 1) - mean * added
    products = tl.sum(codes * x, 1)
    slope = products / tl.maximum(spread, LEAST_SPREAD)
    differ = spread > LEAST_SPREAD
    error = total - products * slope
    return tl.where(differ, slope, scale), tl.where(differ, -slope * mean, centre), error


@triton.jit
def _fit(
    values, there, count, BITS: tl.constexpr, SHARES: tl.constexpr, SHARE_STEP: tl.constexpr,
    ROUNDS: tl.constexpr, POLISH: tl.constexpr, LEAST_SPREAD: tl.constexpr,
):  # fmt: skip
    """Scale and centre [rows] of groups, NaN where a value has no square. See `groupwise._fit`."""
    most: tl.constexpr = (1 << BITS) - 1
    sound = tl.sum((tl.abs(values) < LARGEST).to(tl.int32), 1) == values.shape[1]
    values = tl.where(sound[:, None], values, 0.0)
    mean = tl.sum(values, 1) / count
    x = tl.where(there, values - mean[:, None], 0.0)
    total = tl.sum(x * x, 1)
    low, high = tl.min(x, 1), tl.max(x, 1)  # zeros are between them
    best = tl.full(total.shape, float("inf"), tl.float32)
    best_scale, best_centre = low, low
    for pair in range(SHARES * SHARES):  # not unrolled: it would be a very long program
        first = low * (1.0 - SHARE_STEP * (pair // SHARES))
        last = high * (1.0 - SHARE_STEP * (pair % SHARES))
        scale = (last - first) / most
        centre = (first + last) / 2 + scale / 2
        error = total
        for _ in tl.static_range(ROUNDS):
            scale, centre, error = _improved(
                x, there, count, scale, centre, total, BITS, LEAST_SPREAD
            )
        better = error < best
        best = tl.where(better, error, best)
        best_scale = tl.where(better, scale, best_scale)
        best_centre = tl.where(better, centre, best_centre)
    for _ in range(POLISH):
        best_scale, best_centre, _error = _improved(
            x, there, count, best_scale, best_centre, total, BITS, LEAST_SPREAD
        )
    nothing = float("nan")
    return tl.where(sound, best_scale, nothing), tl.where(sound, best_centre + mean, nothing)


@triton.jit
def _number_bits(value, HALF: tl.constexpr):
    """Bits of the nearest float16 (HALF) or bfloat16, and that as float32.

    Not by a conversion to bfloat16: Triton's interpreter would cut bits off.
    """
    if HALF:
        half = value.to(tl.float16)
        bits, number = half.to(tl.int16, bitcast=True), half.to(tl.float32)
    else:
        wide = value.to(tl.int32, bitcast=True)
        wide = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
        wide = tl.where(value == value, wide, 0x7FC0)
        bits, number = wide.to(tl.int16), (wide << 16).to(tl.float32, bitcast=True)
    return bits, number


@triton.jit
def _nearest(values, scale, centre, BITS: tl.constexpr):
    """Codes of values [rows, n], from 0 on; 0 for what is not a number."""
    zero: tl.constexpr = 1 << (BITS - 1)
    step = tl.where(scale > 0.0, 1.0 / tl.where(scale > 0.0, scale, 1.0), 0.0)
    code = (values - centre[:, None]) * step[:, None]
    code = tl.minimum(tl.maximum(tl.where(code == code, code, -zero), -zero), zero - 1)
    rounded = (code + 12582912.0) - 12582912.0  # to the even one of two: 1.5 * 2^23 has no room
    return rounded.to(tl.int32) + zero


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    values, packed, numbers, rows, columns, value_row, row_bytes, code_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    SHARES: tl.constexpr, SHARE_STEP: tl.constexpr, ROUNDS: tl.constexpr, POLISH: tl.constexpr,
    LEAST_SPREAD: tl.constexpr,
):  # fmt: skip
    """One group of BLOCK rows, by the search of `groupwise`. numbers: `packed` as int16.

    HALF: scales and centres are float16, not bfloat16.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group, groups = tl.program_id(1), tl.num_programs(1)
    real = row < rows
    count = tl.minimum(GROUP, columns - group * GROUP)
    source = (values + row * value_row + group * GROUP)[:, None]
    at = tl.arange(0, GROUP)[None, :]
    there = real[:, None] & (at < count)
    mine = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
    scale, centre = _fit(mine, there, count, BITS, SHARES, SHARE_STEP, ROUNDS, POLISH, LEAST_SPREAD)
    scale_bits, scale = _number_bits(scale, HALF)
    centre_bits, centre = _number_bits(centre, HALF)
    into = numbers + (row * row_bytes + code_bytes) // 2 + group
    tl.store(into, scale_bits, mask=real)
    tl.store(into + groups, centre_bits, mask=real)
    start = group * (GROUP * BITS // 8)
    target = (packed + row * row_bytes + start)[:, None]
    if BITS == 8:
        codes = tl.where(there, _nearest(mine, scale, centre, BITS), 0)
        tl.store(target + at, codes.to(tl.uint8), mask=real[:, None] & (at < code_bytes - start))
    else:  # the group once more, as the halves whose codes share bytes
        at = tl.arange(0, GROUP // 2)[None, :]
        half = (count + 1) // 2
        there = real[:, None] & (at < half)
        mine = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
        codes = tl.where(there, _nearest(mine, scale, centre, BITS), 0)
        there = real[:, None] & (at < count - half)
        mine = tl.load(source + half + at, mask=there, other=0.0).to(tl.float32)
        codes = codes | tl.where(there, _nearest(mine, scale, centre, BITS), 0) << 4
        tl.store(target + at, codes.to(tl.uint8), mask=real[:, None] & (at < code_bytes - start))
