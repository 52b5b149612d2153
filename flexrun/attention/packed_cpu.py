"""Attention over pages of codes of four bits on the CPU: what is loaded is codes, and stays codes.

A value is centre + scale * (code - 8), with one scale and centre for a group of neighbours in a
row. So a query times a key is, for each group, scale * (query times codes - 8 * sum of the query) +
centre * (sum of the query), and weighted values are codes times (weight * scale), plus one number
for all of a group. Numbers of a row come in once, and sums of a query are made once for its span.
Queries in bfloat16 become whole numbers of 16 bits, with one factor for each group, where the
processor multiplies such pairs: what that changes is less than what bfloat16 rounds.

A row is [codes | scales | centres], a page is one head's keys after another's, then its values.
"""

from __future__ import annotations

from typing import Any

from compression import code_vectors as codes
from compression import vector_memory as memory
from compression import vectors as v
from compression.compiled import part
from compression.vectors import LANES, F
from flexrun.attention import vector_sums as sums
from flexrun.attention.lanes import BLOCK, choose
from flexrun.attention.packed_queries import (
    group_room,
    halves,
    prepare,
    prepared_at,
    query_size,
    room,
    scaled_at,
)
from flexrun.attention.shares_cpu import shares_of
from flexrun.attention.softmax_cpu import cap, weigh


@part
def _code_bytes(dim: Any) -> Any:
    return (dim + 3) // 4 * 2


@part
def _row_bytes(dim: Any, size: Any) -> Any:
    """See `GroupFormat.row_bytes`."""
    return _code_bytes(dim) + (dim + size - 1) // size * 4


@part
def _numbers(cells: Any, scales: Any, groups: Any, step: Any, t: Any, last: Any, half: Any) -> Any:
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


@part
def _products(
    query: Any, cells: Any, a: Any, b: Any, c: Any, d: Any, half: Any, kept: Any, at: Any,
    full: Any,
) -> Any:  # fmt: skip
    """Products of a group's codes, at `a`, `b`, `c` and `d` in four rows, with four queries.

    What follows a row's last codes is multiplied with zeros.
    """
    q0 = q1 = q2 = q3 = v.splat(F(0))
    step = query_size(query)
    for i in range(0, half, LANES):
        rows = codes.load_rows(cells, a + i, b + i, c + i, d + i)
        q0 = codes.add_codes(query, kept, at, rows, q0)
        q1 = codes.add_codes(query, kept, at + step, rows, q1)
        q2 = codes.add_codes(query, kept, at + 2 * step, rows, q2)
        if full:
            q3 = codes.add_codes(query, kept, at + 3 * step, rows, q3)
        at += 4 * step
    return codes.sum_codes(query, q0, q1, q2, q3)


@part
def _score(
    query: Any, cells: Any, key: Any, low: Any, high: Any, sizes: Any, scale: Any, scores: Any,
    kept: Any, prepared: Any, ahead: Any, full: Any,
) -> None:  # fmt: skip
    """scores [T, 4] of four queries, `prepared` in `kept`, as in the plain kernel.

    The keys from `ahead` on will be the next ones, and are asked for.
    """
    dim, size, last = sizes[3], sizes[5], high - 1
    step = _row_bytes(dim, size)
    groups, numbers, scales = (dim + size - 1) // size, _code_bytes(dim), v.splat(scale)
    for t in range(low, high, 4):
        memory.prefetch_all(cells, ahead + t * step, 4 * step)
        k0, k1 = key + t * step, key + min(t + 1, last) * step
        k2, k3 = key + min(t + 2, last) * step, key + min(t + 3, last) * step
        total, at = v.splat(F(0)), prepared
        for g in range(groups):
            half, i = halves(g * size, dim, size)[0], g * (size >> 1)
            found = _products(
                query, cells, k0 + i, k1 + i, k2 + i, k3 + i, half, kept, at + LANES, full
            )  # fmt: skip
            of_row, centres = _numbers(
                cells, key + numbers + 2 * g, groups, step, t, last, sizes[6]
            )  # fmt: skip
            of_codes = v.fma(found, sums.load_repeated(kept, at), sums.load_repeated(kept, at + 4))
            total = v.fma(of_codes, of_row, total)
            total = v.fma(sums.load_repeated(kept, at + 8), centres, total)
            at += group_room(query, size)
        memory.store(scores, BLOCK * t, v.mul(total, scales))


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
        scale, centre = _numbers(cells, scales, groups, step, t, last, half)
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
def _add_values(
    weights: Any, cells: Any, value: Any, low: Any, high: Any, sizes: Any, states: Any, total: Any,
    scaled: Any, four: Any, full: Any, ahead: Any,
) -> None:  # fmt: skip
    """Weighted values of one page and head, group after group."""
    dim, size = sizes[4], sizes[5]
    step, groups, numbers = _row_bytes(dim, size), (dim + size - 1) // size, _code_bytes(dim)
    for g in range(groups):
        i = g * size
        half, both = halves(i, dim, size)
        vectors = both // LANES * LANES
        _scale(
            weights, cells, value + numbers + 2 * g, groups, step, low, high, sizes[6], scaled,
            four, ahead + g * (4 * step // groups),
        )  # fmt: skip
        _gather(
            scaled, cells, value + i // 2, step, low, high, i, half, vectors, dim, states, total,
            four, full,
        )  # fmt: skip
        if vectors < half:
            _gather_rest(
                scaled, cells, value + i // 2, step, low, high, i, vectors, half, both, dim, states,
                total, four,
            )  # fmt: skip


@part
def _attend_page(
    query: Any, cells: Any, sizes: Any, masks: Any, span: Any, page: Any, start: Any, ahead: Any,
    scores: Any, top: Any, mass: Any, total: Any, four: Any, lanes: Any, kept: Any,
) -> None:  # fmt: skip
    """See the plain kernel's."""
    kv_heads, group, tokens, dim, value_dim, size, _ = sizes
    key_bytes, value_bytes = tokens * _row_bytes(dim, size), tokens * _row_bytes(value_dim, size)
    page_bytes = kv_heads * (key_bytes + value_bytes)
    states, lows, highs = lanes[1], lanes[2], lanes[3]
    spare, prepared = top.shape[0] - BLOCK, prepared_at(sizes)
    of_block = (dim + size - 1) // size * group_room(query, size)
    scaled = kept[scaled_at(sizes) :]
    for k in range(kv_heads):
        key = page * page_bytes + k * key_bytes
        value = page * page_bytes + kv_heads * key_bytes + k * value_bytes
        # Of the next head, or page: those of this one were asked for before.
        key_ahead, value_ahead = key + key_bytes, value + value_bytes
        if k + 1 == kv_heads:
            key_ahead = ahead * page_bytes
            value_ahead = key_ahead + kv_heads * key_bytes
        for block in range(0, span[1] * group, BLOCK):
            full = block + BLOCK <= span[1] * group
            low, high, masked = choose(block, k, span, sizes, start, masks, spare, lanes)
            here, prepared = prepared, prepared + of_block
            if low >= high:
                continue
            _score(
                query, cells, key, low, high, sizes, masks[3], scores, kept, here, key_ahead, full
            )  # fmt: skip
            if masks[2] > 0:
                cap(scores, low, high, masks[2])
            weigh(
                scores, low, high, lows, highs, masked, states, top, mass, total, value_dim, four
            )  # fmt: skip
            _add_values(
                scores, cells, value, low, high, sizes, states, total, scaled, four, full,
                value_ahead,
            )  # fmt: skip


attend_packed = shares_of(_attend_page, prepare, room)
