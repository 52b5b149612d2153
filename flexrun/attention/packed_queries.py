"""Queries as the CPU's kernel for packed pages multiplies them: made once for a span.

Of every four queries of a KV head and each group of values: a factor, what is added to a sum of
products, and the sum of the query's values, four times each; then the queries, 32 values at a time
in the order of `code_vectors.add_codes`, over that factor. They share one array with scores.
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


@part
def query_size(query: Any) -> Any:
    """float32 that 32 of a query's values take."""
    return LANES if codes.takes_words(query) else 2 * LANES


@part
def group_room(query: Any, size: Any) -> Any:
    """Of a whole group: three numbers of four queries, and the queries."""
    return LANES + (size >> 5) * BLOCK * query_size(query)


@part
def scaled_at(sizes: Any) -> Any:
    """Weights times scales follow the weights; as far from them are those as words."""
    return (BLOCK * sizes[2] + 2 * LANES - 1) // LANES * LANES


@part
def prepared_at(sizes: Any) -> Any:
    """The last 32 before it are spare."""
    return 3 * scaled_at(sizes) + 2 * LANES


@part
def room(query: Any, sizes: Any, states: Any) -> Any:
    groups = (sizes[3] + sizes[5] - 1) // sizes[5]
    blocks = states // BLOCK + sizes[0] * (states // (sizes[0] * sizes[1]))
    return prepared_at(sizes) + blocks * groups * group_room(query, sizes[5])


@part
def _sum_and_most(query: Any, first: Any, count: Any, four: Any) -> Any:
    """Of a query's values: their sum, and the largest without its sign."""
    vectors = count // LANES * LANES
    added = most = v.splat(F(0))
    for i in range(first, first + vectors, LANES):
        x = memory.load(query, i)
        added, most = v.add(added, x), v.larger(most, v.larger(x, v.sub(v.splat(F(0)), x)))
    sums.store_folded_sum(four, 0, added)
    total = (four[0] + four[1]) + (four[2] + four[3])
    sums.store_folded_max(four, 0, most)
    top = max(max(four[0], four[1]), max(four[2], four[3]))
    for i in range(first + vectors, first + count):
        x = memory.load_one(query, i)
        total, top = total + x, max(top, abs(x))
    return total, top


@part
def _prepare_query(
    query: Any, first: Any, count: Any, factor: Any, kept: Any, spare: Any, at: Any, four: Any
) -> Any:
    """Put one group of one query, times `factor`, where `_products` reads it; the sum of it.

    spare: where in `kept` there is room for 32.
    """
    half, both, factors = (count + 1) // 2, count // 2, v.splat(factor)
    added, middle = v.splat(F(0)), v.splat(F(0.5))
    for i in range(0, half, LANES):
        if i + LANES <= both:
            low, high = memory.load(query, first + i), memory.load(query, first + half + i)
        else:
            kept[spare : spare + 2 * LANES] = 0
            for j in range(i, half):
                kept[spare + j - i] = memory.load_one(query, first + j)
                if j < both:
                    kept[spare + LANES + j - i] = memory.load_one(query, first + half + j)
            low, high = memory.load(kept, spare), memory.load(kept, spare + LANES)
        if codes.takes_words(query):
            low = v.floor(v.fma(low, factors, middle))
            high = v.floor(v.fma(high, factors, middle))
        added = v.add(added, v.add(low, high))
        codes.store_query(query, kept, at, low, high)
        at += BLOCK * query_size(query)
    sums.store_folded_sum(four, 0, added)
    return ((four[0] + four[1]) + (four[2] + four[3])) / factor


@part
def prepare(
    query: Any, sizes: Any, masks: Any, span: Any, four: Any, lanes: Any, kept: Any
) -> None:
    """Of every four queries and group: what a sum of products is times, what is added, and sums."""
    dim, size, to = sizes[3], sizes[5], prepared_at(sizes)
    spare, step = to - 2 * LANES, query_size(query)
    for k in range(sizes[0]):
        for block in range(0, span[1] * sizes[1], BLOCK):
            choose(block, k, span, sizes, 0, masks, 0, lanes)
            for first in range(0, dim, size):
                count = min(size, dim - first)
                for lane in range(BLOCK):
                    q, factor = lanes[0, lane] + first, F(1)
                    total, most = _sum_and_most(query, q, count, four)
                    if codes.takes_words(query):
                        factor = F(codes.MOST) / most if most > F(1e-30) else F(1)
                    kept[to + lane] = F(1) / factor
                    kept[to + 2 * BLOCK + lane] = total
                    at = to + LANES + lane * step
                    stored = _prepare_query(query, q, count, factor, kept, spare, at, four)
                    kept[to + BLOCK + lane] = F(-8) * stored
                to += group_room(query, size)
