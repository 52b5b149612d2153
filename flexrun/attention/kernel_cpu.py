"""Attention over pages on the CPU: a Numba kernel that reads every page once, where it lies.

Sixteen-bit pages are read from memory as sixteen bits, widened in registers, and nothing is
gathered or masked ahead. Four query vectors are served at a time (query heads of one KV head, rows
of one span), so that a key or value is loaded once for four. The softmax is online: what is known
so far is a running maximum, the sum of exponentials and the weighted values, all in float32
(FlashAttention-2, algorithm 1). The flat list of pages is cut into shares of about equal work, one
for each thread; a sequence cut in two is put together at the end.

Legend: S = spans, K = KV heads, G = query heads of each, H = K * G, T = positions of a page, D and
V = sizes of a key and a value. A state is a row and a query head: row * H + head. Arrays are flat.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compression import vector_memory as memory
from compression import vectors as v
from compression.compiled import kernel, part
from compression.vectors import LANES, F
from flexrun.attention import vector_sums as sums
from flexrun.attention.lanes import BLOCK, choose, hide

NONE = F(-1e30)
"""The score of what is not seen: below any score, and differences of it are numbers."""


@part
def _prefetch(cells: Any, first: Any, count: Any) -> None:
    for i in range(first, first + count, memory.line(cells)):
        memory.prefetch(cells, i)


@part
def _products(
    query: Any, at: Any, cells: Any, key: Any, dim: Any, value: Any, value_dim: Any, full: Any
) -> Any:
    """Products of a key with four queries at `at` [4], added up as far as `sums.fold` does.

    Its value will be read next, and is asked for between the products.
    """
    whole, vectors = dim // (2 * LANES) * (2 * LANES), dim // LANES * LANES
    q0, q1, q2, q3 = at[0], at[1], at[2], at[3]
    a = b = c = d = v.splat(F(0))
    for i in range(0, whole, 2 * LANES):
        _prefetch(cells, value + i, 2 * LANES)
        a = memory.add_products(query, q0 + i, cells, key + i, a)
        b = memory.add_products(query, q1 + i, cells, key + i, b)
        c = memory.add_products(query, q2 + i, cells, key + i, c)
        if full:
            d = memory.add_products(query, q3 + i, cells, key + i, d)
    _prefetch(cells, value + whole, value_dim - whole)
    for i in range(whole, vectors, LANES):
        x = memory.load(cells, key + i)
        a = v.fma(memory.load(query, q0 + i), x, a)
        b = v.fma(memory.load(query, q1 + i), x, b)
        c = v.fma(memory.load(query, q2 + i), x, c)
        if full:
            d = v.fma(memory.load(query, q3 + i), x, d)
    return sums.fold(a, b, c, d)


@part
def _score(
    query: Any, at: Any, cells: Any, key: Any, low: Any, high: Any, dim: Any, scale: Any,
    scores: Any, value: Any, size: Any, full: Any,
) -> None:  # fmt: skip
    """scores [T, 4] of four queries at `at` [4]; up to three keys beyond `high` mean nothing.

    Four keys at a time, whose scores fill a vector. The values of one page and head are too few for
    the processor to see them coming.
    """
    scales, last = v.splat(scale), high - 1
    for t in range(low, high, 4):
        t1, t2, t3 = min(t + 1, last), min(t + 2, last), min(t + 3, last)
        a = _products(query, at, cells, key + t * dim, dim, value + t * size, size, full)
        b = _products(query, at, cells, key + t1 * dim, dim, value + t1 * size, size, full)
        c = _products(query, at, cells, key + t2 * dim, dim, value + t2 * size, size, full)
        d = _products(query, at, cells, key + t3 * dim, dim, value + t3 * size, size, full)
        sums.store_scores(scores, BLOCK * t, a, b, c, d, scales)
    for i in range(dim // LANES * LANES, dim):
        for t in range(low, high):
            x = memory.load_one(cells, key + t * dim + i)
            for lane in range(BLOCK):
                product = memory.load_one(query, at[lane] + i) * x
                scores[BLOCK * t + lane] += product * scale


@part
def _cap(scores: Any, low: Any, high: Any, softcap: Any) -> None:
    """softcap * tanh(score / softcap)"""
    scale, one = v.splat(F(2.0) / softcap), v.splat(F(1.0))
    for i in range(BLOCK * low, BLOCK * high, LANES):
        e = v.exp(v.smaller(v.mul(memory.load(scores, i), scale), v.splat(F(80.0))))
        tanh = v.sub(one, v.div(v.splat(F(2.0)), v.add(e, one)))
        memory.store(scores, i, v.mul(tanh, v.splat(softcap)))


@part
def _raise_tops(four: Any, states: Any, top: Any, mass: Any, total: Any, dim: Any) -> None:
    """Bring what is known so far in line with the larger scores in `four`."""
    for lane in range(BLOCK):
        state = states[lane]
        if four[lane] > top[state]:  # which is rare once some pages were seen
            scale = F(np.exp(top[state] - four[lane]))
            top[state] = four[lane]
            mass[state] *= scale
            for i in range(state * dim, (state + 1) * dim):
                total[i] *= scale
        four[lane] = top[state]


@part
def _fill(scores: Any, end: Any, value: Any) -> None:
    """The last vector of scores may reach beyond them."""
    memory.store(scores, end, v.splat(value))


@part
def _weigh(
    scores: Any, low: Any, high: Any, lows: Any, highs: Any, masked: Any,
    states: Any, top: Any, mass: Any, total: Any, dim: Any, four: Any,
) -> None:  # fmt: skip
    """Turn scores into weights, exp(score - top), and add them up."""
    first, last = BLOCK * low, BLOCK * high
    if masked:
        hide(scores, low, high, lows, highs, NONE)
    _fill(scores, last, NONE)
    highest = memory.load(scores, first)
    for i in range(first + LANES, last, LANES):
        highest = v.larger(highest, memory.load(scores, i))
    sums.store_folded_max(four, 0, highest)
    _raise_tops(four, states, top, mass, total, dim)
    tops, added = sums.load_repeated(four, 0), v.splat(F(0))
    for i in range(first, last, LANES):
        memory.store(scores, i, v.exp(v.sub(memory.load(scores, i), tops)))
    if masked:
        hide(scores, low, high, lows, highs, F(0))
    _fill(scores, last, F(0))
    for i in range(first, last, LANES):
        added = v.add(added, memory.load(scores, i))
    sums.store_folded_sum(four, 0, added)
    for lane in range(BLOCK):
        mass[states[lane]] += four[lane]


@part
def _gather(
    weights: Any, cells: Any, value: Any, low: Any, high: Any, dim: Any, states: Any, total: Any,
    ahead: Any, key_dim: Any, full: Any,
) -> None:  # fmt: skip
    """Add the weighted values of one page to four totals, in the order of `memory.load_two`.

    One vector of each at a time: twice as many totals are more than AVX2 has registers for. The
    keys from `ahead` on will be read next, and are asked for in the order in which they lie there.
    """
    whole, vectors = dim // (2 * LANES) * (2 * LANES), dim // LANES * LANES
    asked, step = ahead + low * key_dim, key_dim * LANES // max(vectors, 1)
    t0, t1, t2, t3 = states[0] * dim, states[1] * dim, states[2] * dim, states[3] * dim
    for i in range(0, vectors, LANES):
        half = i % (2 * LANES)
        a, b = memory.load(total, t0 + i), memory.load(total, t1 + i)
        c, d = memory.load(total, t2 + i), memory.load(total, t3 + i)
        for t in range(low, high):
            memory.prefetch(cells, asked)
            asked += step
            if i < whole:
                two = memory.load_two(cells, value + t * dim + i - half)
                x = two[0] if half == 0 else two[1]
            else:
                x = memory.load(cells, value + t * dim + i)
            w = BLOCK * t
            a = v.fma(v.splat(memory.load_one(weights, w)), x, a)
            b = v.fma(v.splat(memory.load_one(weights, w + 1)), x, b)
            c = v.fma(v.splat(memory.load_one(weights, w + 2)), x, c)
            if full:
                d = v.fma(v.splat(memory.load_one(weights, w + 3)), x, d)
        memory.store(total, t0 + i, a)
        memory.store(total, t1 + i, b)
        memory.store(total, t2 + i, c)
        memory.store(total, t3 + i, d)
    for i in range(vectors, dim):
        for lane in range(BLOCK):
            for t in range(low, high):
                x = memory.load_one(cells, value + t * dim + i)
                total[states[lane] * dim + i] += weights[BLOCK * t + lane] * x


@part
def _attend_page(
    query: Any, cells: Any, sizes: Any, masks: Any, span: Any, page: Any, start: Any, ahead: Any,
    scores: Any, top: Any, mass: Any, total: Any, four: Any, lanes: Any,
) -> None:  # fmt: skip
    """One page, which holds positions from `start` on, for all heads of a span's rows.

    `ahead` is the page after it.
    """
    kv_heads, group, tokens, dim, value_dim = sizes
    page_cells, values = kv_heads * tokens * (dim + value_dim), kv_heads * tokens * dim
    at, states, lows, highs = lanes[0], lanes[1], lanes[2], lanes[3]
    spare = top.shape[0] - BLOCK
    for k in range(kv_heads):
        key = page * page_cells + k * tokens * dim
        value = page * page_cells + values + k * tokens * value_dim
        key_ahead = key + tokens * dim if k + 1 < kv_heads else ahead * page_cells
        for block in range(0, span[1] * group, BLOCK):
            full = block + BLOCK <= span[1] * group
            low, high, masked = choose(block, k, span, sizes, start, masks, spare, lanes)
            if low >= high:
                continue
            _score(
                query, at, cells, key, low, high, dim, masks[3], scores, value, value_dim, full
            )  # fmt: skip
            if masks[2] > 0:
                _cap(scores, low, high, masks[2])
            _weigh(
                scores, low, high, lows, highs, masked, states, top, mass, total, value_dim, four
            )  # fmt: skip
            _gather(
                scores, cells, value, low, high, value_dim, states, total, key_ahead, dim, full
            )  # fmt: skip


@kernel
def attend_share(
    query: Any, cells: Any, sizes: Any, masks: Any, spans: Any, pages: Any, indices: Any,
    first: Any, last: Any, out: Any, lse: Any, part_span: Any, part_out: Any, part_lse: Any,
) -> None:  # fmt: skip
    """Attend to entries `first` to `last` of the list of pages.

    query: [rows * H * D], see `memory.add_products`. cells: the pool, flat. sizes: (K, G, T, D,
    V). masks: (window, chunk, softcap: 0 for none; scale). spans: [S + 1, 4] first row, rows,
    first position, start of its pages. pages, indices: [entries] page number, and place in the
    sequence's table. A span whose pages are all in the share goes to out [rows * H * V] and lse
    [rows * H]; a cut one, of which there are two at most, to part_out [2, most rows * H * V] and
    part_lse [2, most rows * H], with its number in part_span [2].
    """
    heads, tokens, value_dim = sizes[0] * sizes[1], sizes[2], sizes[4]
    most = part_lse.shape[1] + BLOCK
    scores = _aligned(BLOCK * tokens + LANES)
    total, top, mass = _aligned(most * value_dim), _aligned(most), _aligned(most)
    four, lanes = _aligned(BLOCK), _aligned(8 * BLOCK).view(np.int64).reshape((4, BLOCK))
    span = np.searchsorted(spans[:, 3], first, side="right") - 1
    parts = 0
    split = value_dim // (2 * LANES) * (2 * LANES) if memory.splits_pairs(cells) else 0
    while first < last:
        end = min(spans[span + 1, 3], last)
        total[:], top[:], mass[:] = 0, NONE, 0
        for entry in range(first, end):
            ahead = pages[min(entry + 1, last - 1)]
            _attend_page(
                query, cells, sizes, masks, spans[span], pages[entry], indices[entry] * tokens,
                ahead, scores, top, mass, total, four, lanes,
            )  # fmt: skip
        at, states = spans[span, 0] * heads, spans[span, 1] * heads
        if first == spans[span, 3] and end == spans[span + 1, 3]:
            _finish(total, top, mass, states, value_dim, split, out[at * value_dim :], lse[at:])
        else:
            _finish(total, top, mass, states, value_dim, split, part_out[parts], part_lse[parts])
            part_span[parts] = span
            parts += 1
        first = end
        span += 1


@part
def _aligned(count: Any) -> Any:
    """float32 [count] in cache lines of its own.

    Vectors that cross from one line to the next are loaded twice, and two threads that write to the
    same line take turns.
    """
    room = np.empty((count + 2 * LANES - 1) // LANES * LANES, F)
    return room[(-room.ctypes.data // 4) % LANES :][:count]


@part
def _finish(
    total: Any, top: Any, mass: Any, states: Any, dim: Any, split: Any, out: Any, lse: Any
) -> None:
    """The first `split` values of a state are in the order of `load_two`."""
    for state in range(states):
        seen = mass[state] > 0
        share = F(1.0) / mass[state] if seen else F(0)
        start = state * dim
        for i in range(0, split, 2 * LANES):
            for lane in range(LANES):
                out[start + i + 2 * lane] = total[start + i + lane] * share
                out[start + i + 2 * lane + 1] = total[start + i + LANES + lane] * share
        for i in range(start + split, start + dim):
            out[i] = total[i] * share
        lse[state] = top[state] + np.log(mass[state]) if seen else F(-np.inf)
