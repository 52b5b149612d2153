"""Attention over pages of codes of four bits on the CPU: what is loaded is codes, and stays codes.

A value is centre + scale * (code - 8), with one scale and centre for a group of neighbours in a
row. So a query times a key is, for each group, scale * (query times codes - 8 * sum of the query) +
centre * (sum of the query), and weighted values are codes times (weight * scale), plus one number
for all of a group. Numbers of a row come in once, and sums of a query are made once for its span.
Queries in bfloat16 become whole numbers of 16 bits, with one factor for each group, where the
processor multiplies such pairs: what that changes is less than what bfloat16 rounds.

A page is one head's keys after another's, then its values.
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
    prepare,
    prepared_at,
    query_size,
    room,
    scaled_at,
)
from flexrun.attention.packed_rows import code_bytes, halves, numbers_of, row_bytes
from flexrun.attention.packed_values import add_values
from flexrun.attention.shares_cpu import shares_of
from flexrun.attention.softmax_cpu import cap, weigh


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
    step = row_bytes(dim, size)
    groups, numbers, scales = (dim + size - 1) // size, code_bytes(dim), v.splat(scale)
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
            of_row, centres = numbers_of(
                cells, key + numbers + 2 * g, groups, step, t, last, sizes[6]
            )  # fmt: skip
            of_codes = v.fma(found, sums.load_repeated(kept, at), sums.load_repeated(kept, at + 4))
            total = v.fma(of_codes, of_row, total)
            total = v.fma(sums.load_repeated(kept, at + 8), centres, total)
            at += group_room(query, size)
        memory.store(scores, BLOCK * t, v.mul(total, scales))


@part
def _attend_page(
    query: Any, cells: Any, sizes: Any, masks: Any, span: Any, page: Any, start: Any, ahead: Any,
    scores: Any, top: Any, mass: Any, total: Any, four: Any, lanes: Any, kept: Any,
) -> None:  # fmt: skip
    """See the plain kernel's."""
    kv_heads, group, tokens, dim, value_dim, size, _ = sizes
    key_bytes, value_bytes = tokens * row_bytes(dim, size), tokens * row_bytes(value_dim, size)
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
            add_values(
                query, scores, cells, value, low, high, sizes, states, total, scaled, four, full,
                value_ahead,
            )  # fmt: skip


attend_packed = shares_of(_attend_page, prepare, room)
