"""Attention over paged keys and values in groups of 4 bits, as a Triton kernel.

As in `kernel_gpu`, but for how keys and values are read: codes, scales and centres, and what they
stand for is in registers only. A byte holds the codes of two columns half a group apart. So a row
is expanded to two halves, the columns of all low and of all high codes, and the query and the
output have their columns in the same two halves.

GROUPS and HALF: a row's groups and a group's bytes as the kernel holds them, powers of two. What
is no column of the row is 0 in the query, and is not stored of the output.
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

BITS_OF_2_23 = tl.constexpr(0x4B000000)
"""Of a float32, whose last bits count ones: a small integer joins them without a conversion."""


@triton.jit
def _columns(SIZE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr):
    """Columns of the low codes of a row's bytes, which are there, and the same of the high ones."""
    byte = tl.arange(0, GROUPS * HALF)
    first, at = byte // HALF * GROUP, byte % HALF
    count = tl.minimum(GROUP, SIZE - first)
    half = (count + 1) // 2
    return first + at, at < half, first + half + at, at < count - half


@triton.jit
def _load_numbers(
    numbers, rows, first, held, COUNT: tl.constexpr, GROUPS: tl.constexpr, KIND: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Numbers `first` to `first` + COUNT of rows, as float32 [rows, GROUPS]; others are any.

    KIND: the type of numbers. Where they are given as int32, each is in the lower or the upper half
    of one: the compiler asks ahead of time for nothing smaller.
    """
    group = tl.arange(0, GROUPS)
    at = first + group
    words: tl.constexpr = numbers.dtype.element_ty == tl.int32
    if words:
        pointers = numbers + (rows >> 2)[:, None] + (at >> 1)[None, :]
    else:
        pointers = numbers + (rows >> 1)[:, None] + at[None, :]
    if MASKED:
        loaded = tl.load(pointers, mask=held[:, None] & (group < COUNT)[None, :], other=0)
    elif COUNT == GROUPS:
        loaded = tl.load(pointers)
    else:
        loaded = tl.load(pointers, mask=(group < COUNT)[None, :], other=0)
    if words:
        loaded = (loaded >> ((at & 1) * 16)[None, :]).to(tl.int16).to(KIND, bitcast=True)
    return loaded.to(tl.float32)


@triton.jit
def _load_halves(
    codes, numbers, nibble, rows, held, SIZE: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The values of the two halves of rows that begin at bytes `rows`, [BLOCK_N, GROUPS * HALF].

    MASKED: rows not `held` are 0, whatever they hold. Keys, groups and bytes are three axes, so
    that a scale is loaded once for many bytes.
    """
    count: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    used: tl.constexpr = SIZE // GROUP * (GROUP // 2) + (SIZE % GROUP + 1) // 2
    group, byte = tl.arange(0, GROUPS), tl.arange(0, HALF)
    column = (group * (GROUP // 2))[None, :, None] + byte[None, None, :]
    pointers = codes + rows[:, None, None] + column
    if used == GROUPS * HALF:
        both = tl.load(pointers, mask=held[:, None, None], other=0) if MASKED else tl.load(pointers)
    else:  # compared with a constant: the compiler sees how many neighbours it may load together
        there = column < used
        both = tl.load(pointers, mask=held[:, None, None] & there if MASKED else there, other=0)
    first: tl.constexpr = (SIZE + 3) // 4
    scale = _load_numbers(numbers, rows, first, held, count, GROUPS, KIND, MASKED)
    centre = _load_numbers(numbers, rows, first + count, held, count, GROUPS, KIND, MASKED)
    scale, centre = scale[:, :, None], centre[:, :, None]
    both = both.to(tl.int32)
    low = ((both & nibble) | BITS_OF_2_23).to(tl.float32, bitcast=True)
    high = ((both & (nibble << 4)) | BITS_OF_2_23).to(tl.float32, bitcast=True)
    low = (low - 8388616.0) * scale + centre  # 2^23, and the code of the centre
    high = (high - 8388736.0) * (scale * 0.0625) + centre  # 16 times that code: it is not shifted
    shape: tl.constexpr = GROUPS * HALF
    return tl.reshape(low, [BLOCK_N, shape]), tl.reshape(high, [BLOCK_N, shape])


@triton.jit
def _step(
    low_query, high_query, low_acc, high_acc, top, total, start, limit, last, position, seen_from,
    keys, values, key_numbers, value_numbers, nibble, pages, indices, head, key_page, value_page,
    factor, inner, D: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, KEY_GROUPS: tl.constexpr,
    KEY_HALF: tl.constexpr, VALUE_GROUPS: tl.constexpr, VALUE_HALF: tl.constexpr,
    KIND: tl.constexpr, PAGE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys at places [start, start + BLOCK_N) into the running softmax: see `kernel_gpu`.

    Slots that are not read may hold any codes, and scales that are NaN.
    """
    key_row: tl.constexpr = (D + 3) // 4 * 2 + (D + GROUP - 1) // GROUP * 4
    value_row: tl.constexpr = (V + 3) // 4 * 2 + (V + GROUP - 1) // GROUP * 4
    page, offset, at, held = slots_of(
        start, limit, last, pages, indices, PAGE_TOKENS, BLOCK_N, MASKED
    )
    token = head * PAGE_TOKENS + offset
    low, high = _load_halves(
        keys, key_numbers, nibble, page * key_page + token * key_row, held, D, GROUP, KEY_GROUPS,
        KEY_HALF, KIND, BLOCK_N, MASKED,
    )  # fmt: skip
    low_value, high_value = _load_halves(
        values, value_numbers, nibble, page * value_page + token * value_row, held, V, GROUP,
        VALUE_GROUPS, VALUE_HALF, KIND, BLOCK_N, MASKED,
    )  # fmt: skip
    kind = low_query.dtype
    scores = tl.dot(low_query, tl.trans(low.to(kind)), input_precision="ieee")
    scores = tl.dot(high_query, tl.trans(high.to(kind)), scores, input_precision="ieee")
    weights, kept, top, total = weights_of(
        scores, top, total, at, position, seen_from, factor, inner, CAPPED, MASKED
    )
    weights, kept = weights.to(kind), kept[:, None]
    low_acc = tl.dot(weights, low_value.to(kind), low_acc * kept, input_precision="ieee")
    high_acc = tl.dot(weights, high_value.to(kind), high_acc * kept, input_precision="ieee")
    return low_acc, high_acc, top, total


@triton.jit
def _attend(
    low_query, high_query, position, last, low, high, full_low, full_high, keys, values,
    key_numbers, value_numbers, nibble, pages, indices, head, key_page, value_page, factor, inner,
    D: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, KEY_GROUPS: tl.constexpr,
    KEY_HALF: tl.constexpr, VALUE_GROUPS: tl.constexpr, VALUE_HALF: tl.constexpr,
    KIND: tl.constexpr, PAGE_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, CAPPED: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """The running softmax over places [low, high), as `kernel_gpu` goes over them."""
    seen_from = first_seen(position, WINDOW, CHUNK)
    low_acc = tl.zeros([BLOCK_M, VALUE_GROUPS * VALUE_HALF], tl.float32)
    high_acc = tl.zeros([BLOCK_M, VALUE_GROUPS * VALUE_HALF], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    left, right = low, low
    if FLAT:
        left, right = whole_tiles(low, high, full_low, full_high, BLOCK_N)
        for start in range(left, right, BLOCK_N):
            low_acc, high_acc, top, total = _step(
                low_query, high_query, low_acc, high_acc, top, total, start, high, last, position,
                seen_from, keys, values, key_numbers, value_numbers, nibble, pages, indices, head,
                key_page, value_page, factor, inner, D, V, GROUP, KEY_GROUPS, KEY_HALF,
                VALUE_GROUPS, VALUE_HALF, KIND, PAGE_TOKENS, BLOCK_N, CAPPED, False,
            )  # fmt: skip
    num_left = (left - low + BLOCK_N - 1) // BLOCK_N
    num_right = (high - right + BLOCK_N - 1) // BLOCK_N
    for turn in range(num_left + num_right):
        on_left = turn < num_left  # selected, not branched to: see `kernel_gpu`
        start = tl.where(on_left, low, right - num_left * BLOCK_N) + turn * BLOCK_N
        limit = tl.where(on_left, left, high)
        low_acc, high_acc, top, total = _step(
            low_query, high_query, low_acc, high_acc, top, total, start, limit, last, position,
            seen_from, keys, values, key_numbers, value_numbers, nibble, pages, indices, head,
            key_page, value_page, factor, inner, D, V, GROUP, KEY_GROUPS, KEY_HALF, VALUE_GROUPS,
            VALUE_HALF, KIND, PAGE_TOKENS, BLOCK_N, CAPPED, True,
        )  # fmt: skip
    return low_acc, high_acc, top, total


@triton.jit(do_not_specialize=["num_spans", "piece"])
def packed_kernel(
    query, keys, values, out, lse, first_row, num_rows, first_position, table_start, pages, indices,
    key_numbers, value_numbers, nibble, num_spans, piece, factor, inner, query_row, query_head,
    key_page, value_page, D: tl.constexpr, V: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    KEY_GROUPS: tl.constexpr, KEY_HALF: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    VALUE_HALF: tl.constexpr, FLOAT16: tl.constexpr, TILE_ROWS: tl.constexpr,
    LEAST_ROWS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, CAPPED: tl.constexpr,
    FLAT: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What `kernel_gpu.attention_kernel` does. keys, values: bytes, as their pages' sizes are.

    numbers: the same, typed as scales and centres, which are FLOAT16 or bfloat16, or as int32.
    nibble: 15, which the compiler must not know: it would make it anew for every byte.
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
    starts = query + (at * query_row + head.to(tl.int64) * query_head)[:, None]
    left, on_left, right, on_right = _columns(D, GROUP, KEY_GROUPS, KEY_HALF)
    low_query = tl.load(starts + left[None, :], mask=used[:, None] & on_left[None, :], other=0.0)
    high_query = tl.load(starts + right[None, :], mask=used[:, None] & on_right[None, :], other=0.0)
    if UPCAST:
        low_query, high_query = low_query.to(tl.float32), high_query.to(tl.float32)
    low_acc, high_acc, top, total = _attend(
        low_query, high_query, first + local, first + rows - 1, low, high, full_low, full_high,
        keys, values, key_numbers, value_numbers, nibble, pages + table, indices + table, kv_head,
        key_page, value_page, factor, inner, D, V, GROUP, KEY_GROUPS, KEY_HALF, VALUE_GROUPS,
        VALUE_HALF, tl.float16 if FLOAT16 else tl.bfloat16, PAGE_TOKENS, BLOCK_M, BLOCK_N, WINDOW,
        CHUNK, CAPPED, FLAT,
    )  # fmt: skip
    if SPLIT:
        at = ((split * tiles + tile) * TILE_ROWS + local).to(tl.int64)
    at = at * HEADS + head
    total = store_logs(lse, at, used, top, total)[:, None]
    left, on_left, right, on_right = _columns(V, GROUP, VALUE_GROUPS, VALUE_HALF)
    into = out + at[:, None] * V
    tl.store(into + left[None, :], low_acc / total, mask=used[:, None] & on_left[None, :])
    tl.store(into + right[None, :], high_acc / total, mask=used[:, None] & on_right[None, :])
