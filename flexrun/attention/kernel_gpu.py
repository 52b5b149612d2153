"""Attention over paged keys and values as Triton kernels: online softmax over tiles of keys.

One program takes a tile of query rows of one KV head, and goes over the keys that they see, or over
one piece of these where that balances the load. The query heads that share a KV head are rows of
the tile, so that its keys are read once for all.

Legend: G = query heads of one KV head, D = size of a key, V = size of a value. A key's *position*
counts from the start of its sequence, its *place* counts the tokens of the span's given pages.
Exponents are to base 2, as in hardware. Numbers of pages and rows are multiplied by their strides
in 64 bits: a pool may hold more than 2^31 numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
MOST = tl.constexpr(2147483647)
SCANNED = tl.constexpr(128)
"""Spans whose tiles are counted at a time."""


@triton.jit
def find_tile(
    num_rows, num_spans, tile,
    TILE_ROWS: tl.constexpr, LEAST_ROWS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """The span that a tile is of, its first row there, and its number of rows; 0: no such tile.

    FLAT: the tiles of all spans with LEAST_ROWS or more, one after the other. Otherwise one tile a
    span, and none for a span that has more rows than a tile.
    """
    if FLAT:
        span, before, skipped = 0, 0, 0
        for start in range(0, num_spans, SCANNED):
            each = start + tl.arange(0, SCANNED)
            rows = tl.load(num_rows + each, mask=each < num_spans, other=0)
            tiles = tl.where(rows < LEAST_ROWS, 0, (rows + TILE_ROWS - 1) // TILE_ROWS)
            past = (before + tl.cumsum(tiles, 0) <= tile) & (each < num_spans)
            span += tl.sum(past.to(tl.int32))
            skipped += tl.sum(tl.where(past, tiles, 0))
            before += tl.sum(tiles)
        row = (tile - skipped) * TILE_ROWS
        rows = tl.load(num_rows + span, mask=span < num_spans, other=0)
        rows = tl.minimum(tl.maximum(rows - row, 0), TILE_ROWS)
    else:
        span, row = tile, tile * 0
        rows = tl.load(num_rows + span)
        rows = tl.where(rows > TILE_ROWS, 0, rows)
    return span, row, rows


@triton.jit
def _first_seen(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first position that a row at `position` sees; it sees all from there to its own."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position - (WINDOW - 1), 0)
    if CHUNK > 0:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@triton.jit
def _num_below(indices, count, index):
    """How many of `count` ascending page indices are below `index`."""
    # The first and the last one bound the answer; where no page is missing, they already give it.
    first = tl.load(indices, mask=count > 0, other=0)
    last = tl.load(indices + count - 1, mask=count > 0, other=0)
    low = tl.minimum(tl.maximum(index - last + count - 1, 0), count)
    high = tl.minimum(tl.maximum(index - first, 0), count)
    while low < high:
        middle = (low + high) // 2
        below = tl.load(indices + middle) < index
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _key_ranges(
    indices, count, first, last,
    PAGE_TOKENS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Places [low, high) of pages that rows at positions `first` to `last` see some of.

    And [full_low, full_high) of pages that each of the rows sees all of: they need no mask.
    """
    low, full_low = count * 0, count * 0
    if WINDOW > 0 or CHUNK > 0:
        low = _num_below(indices, count, _first_seen(first, WINDOW, CHUNK) // PAGE_TOKENS)
    high = _num_below(indices, count, last // PAGE_TOKENS + 1)
    full_high = low
    if FLAT:  # a single row's last page is not worth a loop of its own: there, all have the mask
        if WINDOW > 0 or CHUNK > 0:
            index = (_first_seen(last, WINDOW, CHUNK) + PAGE_TOKENS - 1) // PAGE_TOKENS
            full_low = _num_below(indices, count, index)
        full_high = _num_below(indices, count, (first + 1) // PAGE_TOKENS)
    return low * PAGE_TOKENS, high * PAGE_TOKENS, full_low * PAGE_TOKENS, full_high * PAGE_TOKENS


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
    place = start + tl.arange(0, BLOCK_N)
    slot, offset = place // PAGE_TOKENS, place % PAGE_TOKENS
    held = place < limit
    if MASKED:
        page = tl.load(pages + slot, mask=held, other=0)
        at = tl.load(indices + slot, mask=held, other=0) * PAGE_TOKENS + offset
        at = tl.where(held, at, MOST)
        held = at <= last
    else:
        page = tl.load(pages + slot)
    page = page.to(tl.int64)
    key = _load_rows(keys, page * key_page + offset * D, held, D, BLOCK_D, MASKED)
    value = _load_rows(values, page * value_page + offset * V, held, V, BLOCK_V, MASKED)
    scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
    if CAPPED:
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * inner))  # tanh
    if MASKED:
        seen = (at[None, :] >= seen_from[:, None]) & (at[None, :] <= position[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    base = new_top
    if MASKED:  # a row that has seen no key yet has no maximum to subtract
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * factor - base[:, None])
    kept = tl.exp2(top - base)
    total = total * kept + tl.sum(weights, 1)
    value = value.to(query.dtype)
    acc = tl.dot(weights.to(query.dtype), value, acc * kept[:, None], input_precision="ieee")
    return acc, new_top, total


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
    low, high, full_low, full_high = _key_ranges(
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
    seen_from = _first_seen(position, WINDOW, CHUNK)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    left, right = low, low
    if FLAT:
        left = tl.minimum(tl.maximum(full_low, low), high)
        full_high = tl.minimum(tl.maximum(full_high, left), high)
        whole = (full_high - left) // BLOCK_N * BLOCK_N
        left = tl.where(whole > 0, left, low)
        right = left + whole
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
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    logs = tl.where(some, (top + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(lse + rows, logs, mask=used)
    column = tl.arange(0, BLOCK_V)
    pointers = out + rows[:, None] * V + column[None, :]
    tl.store(pointers, acc / total[:, None], mask=used[:, None] & (column < V)[None, :])


INTERPRETED = not isinstance(attention_kernel, triton.JITFunction)
"""Triton's interpreter runs the kernels, on the CPU."""
