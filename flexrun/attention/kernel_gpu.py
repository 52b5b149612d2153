"""Attention over paged keys and values as Triton kernels: online softmax over tiles of keys.

One program takes a tile of query rows of one KV head, and goes over the keys that they see, or over
one piece of these where that balances the load. The query heads that share a KV head are rows of
the tile, so that its keys are read once for all.

Legend: G = query heads of one KV head, D = size of a key, V = size of a value; positions and places
of keys: see `parts_gpu`. Numbers of pages and rows are multiplied by their strides in 64 bits: a
pool may hold more than 2^31 numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexrun.attention.parts_gpu import (
    find_tile,
    first_seen,
    key_ranges,
    slots_of,
    store_logs,
    weights_of,
    whole_tiles,
)


@triton.jit
def _load_rows(
    pointer, starts, held, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """SIZE numbers from each of `starts` on, padded with zeros to BLOCK; rows not `held` are 0."""
    column = tl.arange(0, BLOCK)
    pointers = pointer + starts[:, None] + column[None, :]
    if SIZE == BLOCK and not MASKED:
        rows = tl.load(pointers)
    else:
        mask = held[:, None] if MASKED else (column < SIZE)[None, :]
        if SIZE != BLOCK and MASKED:
            mask = mask & (column < SIZE)[None, :]
        rows = tl.load(pointers, mask=mask, other=0.0)
    return rows


@triton.jit
def _step(
    query, acc, top, total, start, limit, last, position, seen_from, keys, values, pages, indices,
    key_page, value_page, factor, inner, D: tl.constexpr, V: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys at places [start, start + BLOCK_N) into the running softmax.

    MASKED: only those before place `limit`, and each row only those that it sees. `last` is the
    last row's position: slots behind it may hold anything, even NaN, and must not be read.
    """
    page, offset, at, held = slots_of(
        start, limit, last, pages, indices, PAGE_TOKENS, BLOCK_N, MASKED
    )
    key = _load_rows(keys, page * key_page + offset * D, held, D, BLOCK_D, MASKED)
    value = _load_rows(values, page * value_page + offset * V, held, V, BLOCK_V, MASKED)
    scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
    weights, kept, top, total = weights_of(
        scores, top, total, at, position, seen_from, factor, inner, CAPPED, MASKED
    )
    value = value.to(query.dtype)
    acc = tl.dot(weights.to(query.dtype), value, acc * kept[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit(do_not_specialize=["num_spans", "piece"])
def attention_kernel(
    query, keys, values, out, lse, first_row, num_rows, first_position, table_start, pages, indices,
    num_spans, piece, factor, inner, query_row, query_head, key_page, value_page,
    D: tl.constexpr, V: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, TILE_ROWS: tl.constexpr, LEAST_ROWS: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, CAPPED: tl.constexpr, FLAT: tl.constexpr, SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows and one KV head: normalised `out`, natural logarithm in `lse`.

    SPLIT: over the keys' piece number program_id(2) alone; `out` and `lse` then have a row for each
    piece, tile and row of the tile, and what has no keys is left as it was.
    """
    tile_axis: tl.constexpr = 0 if FLAT else 1
    tiles, tile = tl.num_programs(tile_axis), tl.program_id(tile_axis)
    kv_head, split = tl.program_id(1 - tile_axis), tl.program_id(2)
    if FLAT:  # the last tiles of a long prompt have the most to do, so they start first
        tile = tiles - 1 - tile
    span, row, rows = find_tile(num_rows, num_spans, tile, TILE_ROWS, LEAST_ROWS, FLAT)
    if rows == 0:
        return
    table = tl.load(table_start + span)
    count = tl.load(table_start + span + 1) - table
    first = tl.load(first_position + span) + row
    low, high, full_low, full_high = key_ranges(
        indices + table, count, first, first + rows - 1, PAGE_TOKENS, WINDOW, CHUNK, FLAT
    )
    if SPLIT:
        low += split * piece
        high = tl.minimum(high, low + piece)
        if low >= high:
            return
    member = tl.arange(0, BLOCK_M)
    local, head = member // G, kv_head * G + member % G
    used = local < rows
    at = (tl.load(first_row + span) + row + local).to(tl.int64)
    starts = at * query_row + head.to(tl.int64) * query_head
    tile_query = _load_rows(query, starts, used, D, BLOCK_D, True)
    if UPCAST:
        tile_query = tile_query.to(tl.float32)
    acc, top, total = _attend(
        tile_query, first + local, first + rows - 1, low, high, full_low, full_high,
        keys + kv_head * PAGE_TOKENS * D, values + kv_head * PAGE_TOKENS * V, pages + table,
        indices + table, key_page, value_page, factor, inner, D, V, PAGE_TOKENS, BLOCK_M, BLOCK_N,
        BLOCK_D, BLOCK_V, WINDOW, CHUNK, CAPPED, FLAT,
    )  # fmt: skip
    if SPLIT:
        at = ((split * tiles + tile) * TILE_ROWS + local).to(tl.int64)
    _store(out, lse, at * HEADS + head, used, acc, top, total, V, BLOCK_V)


@triton.jit
def _attend(
    query, position, last, low, high, full_low, full_high, keys, values, pages, indices,
    key_page, value_page, factor, inner, D: tl.constexpr, V: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, CAPPED: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """The running softmax over places [low, high): sum of weighted values, maximum, sum of weights.

    First the tiles that all rows see whole, then those to the left of them and to the right.
    """
    seen_from = first_seen(position, WINDOW, CHUNK)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    left, right = low, low
    if FLAT:
        left, right = whole_tiles(low, high, full_low, full_high, BLOCK_N)
        for start in range(left, right, BLOCK_N):
            acc, top, total = _step(
                query, acc, top, total, start, high, last, position, seen_from, keys, values, pages,
                indices, key_page, value_page, factor, inner, D, V, PAGE_TOKENS, BLOCK_N, BLOCK_D,
                BLOCK_V, CAPPED, False,
            )  # fmt: skip
    num_left = (left - low + BLOCK_N - 1) // BLOCK_N
    num_right = (high - right + BLOCK_N - 1) // BLOCK_N
    for turn in range(num_left + num_right):
        # Selected, not branched to: old pipeliners of Triton fail on a branch in a loop.
        on_left = turn < num_left
        start = tl.where(on_left, low, right - num_left * BLOCK_N) + turn * BLOCK_N
        limit = tl.where(on_left, left, high)
        acc, top, total = _step(
            query, acc, top, total, start, limit, last, position, seen_from, keys, values, pages,
            indices, key_page, value_page, factor, inner, D, V, PAGE_TOKENS, BLOCK_N, BLOCK_D,
            BLOCK_V, CAPPED, True,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _store(out, lse, rows, used, acc, top, total, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """Write what a running softmax has come to; rows that saw no key become zeros and -inf."""
    total = store_logs(lse, rows, used, top, total)
    column = tl.arange(0, BLOCK_V)
    pointers = out + rows[:, None] * V + column[None, :]
    tl.store(pointers, acc / total[:, None], mask=used[:, None] & (column < V)[None, :])


INTERPRETED = not isinstance(attention_kernel, triton.JITFunction)
"""Triton's interpreter runs the kernels, on the CPU."""
