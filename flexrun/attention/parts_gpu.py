"""What the Triton kernels of attention share: which rows and keys a program has, and its softmax.

A key's *position* counts from the start of its sequence, its *place* counts the tokens of the
span's given pages. Exponents are to base 2, as in hardware.
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
def first_seen(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
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
def key_ranges(
    indices, count, first, last,
    PAGE_TOKENS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Places [low, high) of pages that rows at positions `first` to `last` see some of.

    And [full_low, full_high) of pages that each of the rows sees all of: they need no mask.
    """
    low, full_low = count * 0, count * 0
    if WINDOW > 0 or CHUNK > 0:
        low = _num_below(indices, count, first_seen(first, WINDOW, CHUNK) // PAGE_TOKENS)
    high = _num_below(indices, count, last // PAGE_TOKENS + 1)
    full_high = low
    if FLAT:  # a single row's last page is not worth a loop of its own: there, all have the mask
        if WINDOW > 0 or CHUNK > 0:
            index = (first_seen(last, WINDOW, CHUNK) + PAGE_TOKENS - 1) // PAGE_TOKENS
            full_low = _num_below(indices, count, index)
        full_high = _num_below(indices, count, (first + 1) // PAGE_TOKENS)
    return low * PAGE_TOKENS, high * PAGE_TOKENS, full_low * PAGE_TOKENS, full_high * PAGE_TOKENS


@triton.jit
def whole_tiles(low, high, full_low, full_high, BLOCK_N: tl.constexpr):
    """Of places [low, high) those of tiles that all rows see whole: [left, right)."""
    left = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.minimum(tl.maximum(full_high, left), high)
    whole = (full_high - left) // BLOCK_N * BLOCK_N
    left = tl.where(whole > 0, left, low)
    return left, left + whole


@triton.jit
def slots_of(
    start, limit, last, pages, indices,
    PAGE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Page and offset in it of places [start, start + BLOCK_N), their positions, and which to read.

    MASKED: only those before place `limit`, up to position `last`; else all, and no positions.
    """
    place = start + tl.arange(0, BLOCK_N)
    slot, offset = place // PAGE_TOKENS, place % PAGE_TOKENS
    held, at = place < limit, place
    if MASKED:
        page = tl.load(pages + slot, mask=held, other=0)
        at = tl.load(indices + slot, mask=held, other=0) * PAGE_TOKENS + offset
        at = tl.where(held, at, MOST)
        held = at <= last
    else:
        page = tl.load(pages + slot)
    return page.to(tl.int64), offset, at, held


@triton.jit
def weights_of(
    scores, top, total, at, position, seen_from, factor, inner,
    CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weights of a tile of keys; what is kept of those before; the new maximum and the new sum.

    MASKED: each row only sees keys whose positions `at` are from `seen_from` to its own `position`.
    """
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
    return weights, kept, new_top, total * kept + tl.sum(weights, 1)


@triton.jit
def store_logs(lse, rows, used, top, total):
    """Write logarithms of sums of exponentials, -inf of no key; by what to divide their weights."""
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    logs = tl.where(some, (top + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(lse + rows, logs, mask=used)
    return total
