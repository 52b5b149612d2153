"""Values in codes of four bits: weighted and added up while they are codes.

Weighted values are codes times (weight * scale), plus one number for all of a group. Where two
rows' codes can be multiplied at a time, such weights become words: see `word_vectors`.
"""

from __future__ import annotations

from typing import Any

from compression import code_vectors as codes
from compression import vector_memory as memory
from compression import vectors as v
from compression import word_vectors as rows
from compression.compiled import part
from compression.vectors import LANES, REGISTER, F
from flexrun.attention import vector_sums as sums
from flexrun.attention.lanes import BLOCK
from flexrun.attention.packed_queries import scaled_at
from flexrun.attention.packed_rows import code_bytes, halves, numbers_of, row_bytes


@part
def _scale(
    weights: Any, cells: Any, scales: Any, groups: Any, step: Any, low: Any, high: Any, half: Any,
    scaled: Any, four: Any, ahead: Any,
) -> None:  # fmt: skip
    """scaled [T, 4]: weights times a group's scales; four: what all values of the group get.

    The values from `ahead` on will be the next ones; of every four rows each group asks for a part.
    """
    part_of_four = 4 * step // groups
    added, eight, last = v.splat(F(0)), v.splat(F(-8)), high - 1
    for t in range(low, high, 4):
        memory.prefetch_all(cells, ahead + t * step, part_of_four)
        scale, centre = numbers_of(cells, scales, groups, step, t, last, half)
        w = memory.load(weights, BLOCK * t)
        memory.store(scaled, BLOCK * t, v.mul(w, scale))
        added = v.fma(w, v.fma(eight, scale, centre), added)
    sums.store_folded_sum(four, 0, added)


@part
def _gather(
    scaled: Any, cells: Any, value: Any, step: Any, low: Any, high: Any, first: Any, half: Any,
    vectors: Any, dim: Any, states: Any, total: Any, four: Any, full: Any,
) -> None:  # fmt: skip
    """Add the weighted values of one page and group to four totals; its codes are at `value`.

    Sums of low halves and of whole bytes: their difference is 16 times the sum of the high halves.
    """
    t0, t1 = states[0] * dim + first, states[1] * dim + first
    t2, t3 = states[2] * dim + first, states[3] * dim + first
    for i in range(0, vectors, LANES):
        a, b, c, d = v.splat(four[0]), v.splat(four[1]), v.splat(four[2]), v.splat(four[3])
        more = v.splat(F(17))
        ab, bb, cb, db = v.mul(a, more), v.mul(b, more), v.mul(c, more), v.mul(d, more)
        for t in range(low, high):
            x, both = codes.load_bytes(cells, value + t * step + i)
            at = BLOCK * t
            w0, w1 = v.splat(scaled[at]), v.splat(scaled[at + 1])
            w2 = v.splat(scaled[at + 2])
            a, ab = v.fma(w0, x, a), v.fma(w0, both, ab)
            b, bb = v.fma(w1, x, b), v.fma(w1, both, bb)
            c, cb = v.fma(w2, x, c), v.fma(w2, both, cb)
            if full:
                w3 = v.splat(scaled[at + 3])
                d, db = v.fma(w3, x, d), v.fma(w3, both, db)
        _add_halves(total, t0 + i, half, a, ab)
        _add_halves(total, t1 + i, half, b, bb)
        _add_halves(total, t2 + i, half, c, cb)
        _add_halves(total, t3 + i, half, d, db)


@part
def _add_halves(total: Any, at: Any, half: Any, low: Any, both: Any) -> None:
    memory.store(total, at, v.add(memory.load(total, at), low))
    high = v.fma(v.sub(both, low), v.splat(F(1 / 16)), memory.load(total, at + half))
    memory.store(total, at + half, high)


@part
def _gather_rest(
    scaled: Any, cells: Any, value: Any, step: Any, low: Any, high: Any, first: Any, done: Any,
    half: Any, both: Any, dim: Any, states: Any, total: Any, four: Any,
) -> None:  # fmt: skip
    """The same for bytes `done` to `half`."""
    for lane in range(BLOCK):
        for i in range(done, half):
            a = b = four[lane]
            for t in range(low, high):
                byte, w = cells[value + t * step + i], scaled[BLOCK * t + lane]
                a += w * F(byte & 15)
                b += w * F(byte >> 4)
            at = states[lane] * dim + first + i
            total[at] += a
            if i < both:
                total[at + half] += b


@part
def _words(scaled: Any, low: Any, high: Any, words: Any, largest: Any) -> None:
    """Of scaled weights [T, 4] the nearest words, where the largest is the largest word.

    words: where in `scaled` they go, rows `low` and low + 1 first; largest: where the largest
    weights of the four queries go.
    """
    zero, most = v.splat(F(0)), v.splat(F(1e-30))
    first, last = BLOCK * low, BLOCK * high
    for i in range(first, last, LANES):
        w = memory.load(scaled, i)
        most = v.larger(most, v.larger(w, v.sub(zero, w)))
    sums.store_folded_max(scaled, largest, most)
    most = sums.load_repeated(scaled, largest)
    factor, middle = v.div(v.splat(F(codes.MOST)), most), v.splat(F(0.5))
    for i in range(first, last, LANES):
        whole = v.floor(v.fma(memory.load(scaled, i), factor, middle))
        rows.store_words(scaled, words + (i - first) // 2, whole)


@part
def _gather_words(
    scaled: Any, cells: Any, value: Any, step: Any, low: Any, high: Any, first: Any, half: Any,
    whole: Any, dim: Any, states: Any, total: Any, four: Any, words: Any, largest: Any, full: Any,
) -> None:  # fmt: skip
    """`_gather` of bytes 0 to `whole`, eight at a time and two rows at a time: see `_words`.

    A last row alone comes twice, the second time with a weight of zero.
    """
    t0, t1 = states[0] * dim + first, states[1] * dim + first
    t2, t3 = states[2] * dim + first, states[3] * dim + first
    for i in range(0, whole, 8):
        a = b = c = d = v.splat(F(0))
        at = words
        for t in range(low, high, 2):
            x = rows.load_codes(
                cells, value + t * step + i, value + min(t + 1, high - 1) * step + i
            )  # fmt: skip
            a = rows.add_weighted(scaled, at, x, a)
            b = rows.add_weighted(scaled, at + 1, x, b)
            c = rows.add_weighted(scaled, at + 2, x, c)
            if full:
                d = rows.add_weighted(scaled, at + 3, x, d)
            at += BLOCK
        _put(total, t0 + i, half, a, scaled[largest], four[0])
        _put(total, t1 + i, half, b, scaled[largest + 1], four[1])
        _put(total, t2 + i, half, c, scaled[largest + 2], four[2])
        _put(total, t3 + i, half, d, scaled[largest + 3], four[3])


@part
def _put(total: Any, at: Any, half: Any, found: Any, largest: Any, more: Any) -> None:
    factor = v.splat(largest * F(1 / codes.MOST))
    rows.add_scaled(total, at, at + half, found, factor, v.splat(more))


@part
def add_values(
    query: Any, weights: Any, cells: Any, value: Any, low: Any, high: Any, sizes: Any, states: Any,
    total: Any, scaled: Any, four: Any, full: Any, ahead: Any,
) -> None:  # fmt: skip
    """Weighted values of one page and head, group after group."""
    words = scaled_at(sizes)
    largest = 2 * words - LANES
    dim, size = sizes[4], sizes[5]
    step, groups, numbers = row_bytes(dim, size), (dim + size - 1) // size, code_bytes(dim)
    for g in range(groups):
        i = g * size
        half, both = halves(i, dim, size)
        _scale(
            weights, cells, value + numbers + 2 * g, groups, step, low, high, sizes[6], scaled,
            four, ahead + g * (4 * step // groups),
        )  # fmt: skip
        if REGISTER < LANES and codes.takes_words(query):
            done = both // 8 * 8
            _words(scaled, low, high, words, largest)
            _gather_words(
                scaled, cells, value + i // 2, step, low, high, i, half, done, dim, states, total,
                four, words, largest, full,
            )  # fmt: skip
        else:
            done = both // LANES * LANES
            _gather(
                scaled, cells, value + i // 2, step, low, high, i, half, done, dim, states, total,
                four, full,
            )  # fmt: skip
        if done < half:
            _gather_rest(
                scaled, cells, value + i // 2, step, low, high, i, done, half, both, dim, states,
                total, four,
            )  # fmt: skip
