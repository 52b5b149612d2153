"""The loops that choose scales, centres and codes on the CPU, for Numba to compile.

As `groupwise.quantize` does it. Sixteen rows are quantized together, a group after another: each
lane of a vector has a group of its own, so that nothing is added up across lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compression import vectors as v
from compression.compiled import part
from compression.groupwise import LEAST_SPREAD, POLISH, ROUNDS, SHARES
from compression.number_bits import number, number_bits
from compression.vector_memory import load, store
from compression.vectors import LANES, F

_SHARES = tuple(np.float32(share) for share in SHARES)
_ROUNDS, _POLISH, _LEAST_SPREAD = ROUNDS, POLISH, F(LEAST_SPREAD)
_MOST_VALUES = 128
"""Of a group."""


@part
def _improve(x: Any, count: Any, scale: Any, centre: Any, most: Any, total: Any) -> Any:
    """Scale and centre by regression on the codes that the old ones give, and the squared error.

    x: [count * LANES], of each lane's group without its mean; total: the sum of its squares.
    """
    zero, least = v.splat(F(0)), v.splat(_LEAST_SPREAD)
    low, high = v.splat(-F((most + 1) // 2)), v.splat(F(most // 2))
    step = v.where_less(zero, scale, v.div(v.splat(F(1)), scale), zero)
    half = v.sub(v.splat(F(0.5)), v.mul(centre, step))
    codes = squares = products = zero
    for i in range(count):
        value = load(x, i * LANES)
        code = v.smaller(v.larger(v.floor(v.fma(value, step, half)), low), high)
        codes = v.add(codes, code)
        squares = v.fma(code, code, squares)
        products = v.fma(code, value, products)
    mean = v.mul(codes, v.splat(F(1) / F(count)))
    spread = v.sub(squares, v.mul(codes, mean))
    slope = v.div(products, v.larger(spread, least))
    error = v.sub(total, v.mul(products, slope))
    scale = v.where_less(least, spread, slope, scale)
    return scale, v.where_less(least, spread, v.sub(zero, v.mul(slope, mean)), centre), error


@part
def _fit(x: Any, count: Any, most: Any, numbers: Any, every: Any) -> None:
    """Scales and centres of sixteen groups x [count * LANES] into numbers [2 * LANES].

    Takes the mean of each group away from x.
    """
    mean = v.splat(F(0))
    for i in range(count):
        mean = v.add(mean, load(x, i * LANES))
    mean = v.mul(mean, v.splat(F(1) / F(count)))
    low = high = v.sub(load(x, 0), mean)
    total = v.splat(F(0))
    for i in range(count):
        value = v.sub(load(x, i * LANES), mean)
        store(x, i * LANES, value)
        low, high = v.smaller(low, value), v.larger(high, value)
        total = v.fma(value, value, total)
    best, unknown = v.splat(F(np.inf)), v.splat(F(np.nan))
    best_scale = best_centre = unknown  # and they stay so where no error is finite
    steps, middle = v.splat(F(1) / F(most)), v.splat(F(0.5))
    for i in range(0, len(_SHARES), every):
        for j in range(0, len(_SHARES), every):
            below, above = _SHARES[i], _SHARES[j]
            if most > 15 and (below < 1 or above < 1):
                continue
            first, last = v.mul(low, v.splat(below)), v.mul(high, v.splat(above))
            scale = v.mul(v.sub(last, first), steps)
            centre = v.mul(v.add(v.add(first, last), scale), middle)
            error = total
            for _ in range(_ROUNDS):
                scale, centre, error = _improve(x, count, scale, centre, most, total)
            best_scale = v.where_less(error, best, scale, best_scale)
            best_centre = v.where_less(error, best, centre, best_centre)
            best = v.smaller(best, error)
    for _ in range(_POLISH):
        best_scale, best_centre, _ = _improve(x, count, best_scale, best_centre, most, total)
    store(numbers, 0, best_scale)
    store(numbers, LANES, v.add(best_centre, mean))


@part
def _write_codes(
    x: Any, count: Any, scale: Any, centre: Any, bits: Any, most: Any, codes: Any, room: Any
) -> None:
    """The codes of a group x [count]; room: int32 of as many."""
    low, high = -F((most + 1) // 2), F(most // 2)
    step = F(1) / scale if scale > 0 else F(0)
    for i in range(count):
        code = np.rint((x[i] - centre) * step)
        code = code if code == code else low  # which integer a NaN becomes is not defined
        room[i] = np.int32(min(max(code, low), high) - low)
    half = (count + 1) // 2 if bits == 4 else count
    for i in range(half):
        codes[i] = np.uint8(room[i])
    if bits == 4:
        for i in range(count - half):
            codes[i] = np.uint8(room[i] | room[i + half] << np.int32(4))


@part
def quantize_rows(
    packed: Any, numbers: Any, columns: Any, bits: Any, group: Any, half: Any, values: Any,
    every: Any,
) -> None:  # fmt: skip
    """values: float32 [rows, columns]; packed, numbers: see `expand_cpu`."""
    groups, most, rows = (columns + group - 1) // group, (1 << bits) - 1, packed.shape[0]
    first = packed.shape[1] // 2 - 2 * groups
    x, found = np.empty(_MOST_VALUES * LANES, F), np.empty(2 * LANES, F)
    room = np.empty(_MOST_VALUES, np.int32)
    for start in range(0, rows, LANES):
        for each in range(groups):
            at = each * group
            count = min(group, columns - at)
            for lane in range(LANES):  # the last row again where there are fewer
                row = min(start + lane, rows - 1)
                for i in range(count):
                    x[i * LANES + lane] = values[row, at + i]
            _fit(x, count, most, found, every)
            for row in range(start, min(start + LANES, rows)):
                of_row = numbers[row, first:]
                of_row[each] = number_bits(found[row - start], half)
                of_row[groups + each] = number_bits(found[LANES + row - start], half)
                s, c = number(of_row[each], half), number(of_row[groups + each], half)
                group_of, codes = values[row, at : at + count], packed[row, at * bits // 8 :]
                _write_codes(group_of, count, s, c, bits, most, codes, room)
        for row in range(start, min(start + LANES, rows)):
            packed[row, (columns * bits + 7) // 8 : 2 * first] = 0
