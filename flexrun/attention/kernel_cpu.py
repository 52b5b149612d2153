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

from compression import vector_memory as memory
from compression import vectors as v
from compression.compiled import part
from compression.vectors import LANES, REGISTER, F
from flexrun.attention import vector_sums as sums
from flexrun.attention.lanes import BLOCK, choose
from flexrun.attention.shares_cpu import shares_of
from flexrun.attention.softmax_cpu import cap, weigh


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
        memory.prefetch_all(cells, value + i, 2 * LANES)
        a = memory.add_products(query, q0 + i, cells, key + i, a)
        b = memory.add_products(query, q1 + i, cells, key + i, b)
        c = memory.add_products(query, q2 + i, cells, key + i, c)
        if full:
            d = memory.add_products(query, q3 + i, cells, key + i, d)
    memory.prefetch_all(cells, value + whole, value_dim - whole)
    for i in range(whole, vectors, LANES):
        x = memory.load(cells, key + i)
        a = v.fma(memory.load(query, q0 + i), x, a)
        b = v.fma(memory.load(query, q1 + i), x, b)
        c = v.fma(memory.load(query, q2 + i), x, c)
        if full:
            d = v.fma(memory.load(query, q3 + i), x, d)
    return sums.fold(a, b, c, d)


@part
def _products_of_two(
    query: Any, at: Any, cells: Any, key: Any, other: Any, dim: Any, value: Any, value_dim: Any,
    scores: Any, place: Any, scale: Any, full: Any,
) -> None:  # fmt: skip
    """Scores of two keys, half a vector of each: queries are loaded once for both."""
    q0, q1, q2, q3 = at[0], at[1], at[2], at[3]
    a = b = c = d = v.splat(F(0))
    memory.prefetch_all(cells, value, 2 * value_dim)
    for i in range(0, dim // LANES * LANES, LANES):
        x, y = memory.load_two_rows(cells, key + i, other + i)
        a = v.fma(memory.load_twice(query, q0 + i), x, a)
        b = v.fma(memory.load_twice(query, q1 + i), x, b)
        c = v.fma(memory.load_twice(query, q2 + i), x, c)
        a = v.fma(memory.load_twice(query, q0 + i + LANES // 2), y, a)
        b = v.fma(memory.load_twice(query, q1 + i + LANES // 2), y, b)
        c = v.fma(memory.load_twice(query, q2 + i + LANES // 2), y, c)
        if full:
            d = v.fma(memory.load_twice(query, q3 + i), x, d)
            d = v.fma(memory.load_twice(query, q3 + i + LANES // 2), y, d)
    sums.store_scores_of_two(scores, place, a, b, c, d, scale)


@part
def _score(
    query: Any, at: Any, cells: Any, key: Any, low: Any, high: Any, dim: Any, scale: Any,
    scores: Any, value: Any, size: Any, full: Any,
) -> None:  # fmt: skip
    """scores [T, 4] of four queries at `at` [4]; up to three keys beyond `high` mean nothing.

    As many keys at a time as fill a vector with their scores, or half of one. The values of one
    page and head are too few for the processor to see them coming.
    """
    scales, last = v.splat(scale), high - 1
    if REGISTER < LANES:
        for t in range(low, high, 2):
            k0, k1 = key + t * dim, key + min(t + 1, last) * dim
            _products_of_two(
                query, at, cells, k0, k1, dim, value + t * size, size, scores, BLOCK * t, scales,
                full,
            )  # fmt: skip
    else:
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
def _weighted(weights: Any, at: Any, x: Any, y: Any, total: Any) -> Any:
    """Two values times their weights, and a total: one step that waits for the total before it."""
    both = v.mul(v.splat(memory.load_one(weights, at)), x)
    both = v.fma(v.splat(memory.load_one(weights, at + BLOCK)), y, both)
    return v.add(total, both)


@part
def _gather_vector(
    weights: Any, cells: Any, value: Any, low: Any, high: Any, dim: Any, i: Any, states: Any,
    total: Any, asked: Any, step: Any, full: Any,
) -> None:  # fmt: skip
    """Add weighted values `i` to i + 16 to four totals.

    More of them at a time are more totals than AVX2 has registers for. The keys from `asked` on,
    `step` for each of the page's tokens, are asked for.
    """
    t0, t1 = states[0] * dim + i, states[1] * dim + i
    t2, t3 = states[2] * dim + i, states[3] * dim + i
    a, b = memory.load(total, t0), memory.load(total, t1)
    c, d = memory.load(total, t2), memory.load(total, t3)
    pairs = low + (high - low) // 2 * 2
    for t in range(low, pairs, 2):
        memory.prefetch(cells, asked + t * step)
        memory.prefetch(cells, asked + (t + 1) * step)
        x = memory.load_turned(cells, value + t * dim, i, dim)
        y = memory.load_turned(cells, value + (t + 1) * dim, i, dim)
        w = BLOCK * t
        a, b = _weighted(weights, w, x, y, a), _weighted(weights, w + 1, x, y, b)
        c = _weighted(weights, w + 2, x, y, c)
        if full:
            d = _weighted(weights, w + 3, x, y, d)
    if pairs < high:
        memory.prefetch(cells, asked + pairs * step)
        x, w = memory.load_turned(cells, value + pairs * dim, i, dim), BLOCK * pairs
        a = v.fma(v.splat(memory.load_one(weights, w)), x, a)
        b = v.fma(v.splat(memory.load_one(weights, w + 1)), x, b)
        c = v.fma(v.splat(memory.load_one(weights, w + 2)), x, c)
        d = v.fma(v.splat(memory.load_one(weights, w + 3)), x, d)
    memory.store(total, t0, a)
    memory.store(total, t1, b)
    memory.store(total, t2, c)
    memory.store(total, t3, d)


@part
def _gather(
    weights: Any, cells: Any, value: Any, low: Any, high: Any, dim: Any, states: Any, total: Any,
    ahead: Any, key_dim: Any, full: Any,
) -> None:  # fmt: skip
    """Add the weighted values of one page to four totals, in the order of `memory.load_turned`.

    The keys from `ahead` on will be read next, and are asked for in the order in which they lie
    there.
    """
    vectors = dim // LANES * LANES
    step = key_dim * LANES // max(vectors, 1)
    asked, tokens = ahead + low * (key_dim - step), high - low
    for i in range(0, vectors, LANES):
        _gather_vector(
            weights, cells, value, low, high, dim, i, states, total, asked, step, full
        )  # fmt: skip
        asked += tokens * step
    for i in range(vectors, dim):
        for lane in range(BLOCK):
            for t in range(low, high):
                x = memory.load_one(cells, value + t * dim + i)
                total[states[lane] * dim + i] += weights[BLOCK * t + lane] * x


@part
def _attend_page(
    query: Any, cells: Any, sizes: Any, masks: Any, span: Any, page: Any, start: Any, ahead: Any,
    scores: Any, top: Any, mass: Any, total: Any, four: Any, lanes: Any, kept: Any,
) -> None:  # fmt: skip
    """One page, which holds positions from `start` on, for all heads of a span's rows.

    `ahead` is the page after it.
    """
    kv_heads, group, tokens, dim, value_dim = sizes[:5]
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
                cap(scores, low, high, masks[2])
            weigh(
                scores, low, high, lows, highs, masked, states, top, mass, total, value_dim, four
            )  # fmt: skip
            _gather(
                scores, cells, value, low, high, value_dim, states, total, key_ahead, dim, full
            )  # fmt: skip


@part
def _room(query: Any, sizes: Any, states: Any) -> Any:
    """Of scores."""
    return BLOCK * sizes[2] + LANES


@part
def _prepare_nothing(
    query: Any, sizes: Any, masks: Any, span: Any, four: Any, lanes: Any, kept: Any
) -> None:
    """Queries are multiplied as they are."""


attend_plain = shares_of(_attend_page, _prepare_nothing, _room)
