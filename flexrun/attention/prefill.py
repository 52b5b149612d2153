"""Attention of many rows of one sequence, with stock torch operations, in bounded memory.

Legend: H = query heads, K = KV heads, n = query rows, S = keys, D and V = sizes of key and value.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, TypeAlias

import torch

from flexrun.attention.reference import masked_attention, visible
from flexrun.attention.state import merge

if TYPE_CHECKING:
    from flexrun.attention.state import AttentionState
    from flexrun.paused_forward import AttentionOptions
    from offload.kv_layout import Chunk
    from offload.paged_kv import PagedKV

    Part: TypeAlias = tuple[torch.Tensor, torch.Tensor]
    """Output [H, n, V], float32 or as the query is, and log of the sum of exponentials [H, n]."""

ROW_TILE = 256
KEY_TILE = 256
"""Rows and keys whose scores are computed together, where no fused kernel does it."""
GATHERED = 2048
"""Positions of earlier sweeps that are copied from their pages at a time."""


def attend_chunk(
    state: AttentionState,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk: Chunk,
    pool: PagedKV,
    options: AttentionOptions,
) -> None:
    """Add a chunk's rows, over the pages of one pool and, if they are its own, over themselves.

    query [H, rows, D], key and value [K, rows, ...] are the whole micro-batch's.
    """
    rows = query[:, chunk.rows]
    if chunk.own:
        own = key[:, chunk.rows], value[:, chunk.rows]
        at = torch.arange(chunk.start, chunk.end, device=query.device)
        _add(state, chunk, _attend(rows, *own, at, chunk, options, own=True))
    tokens = pool.page_tokens
    slots = torch.arange(tokens, device=query.device)
    step = max(1, GATHERED // tokens)
    seen_from = bisect_left(chunk.table, _lowest_seen(chunk.start, options) // tokens)
    for first in range(seen_from, len(chunk.pages), step):
        pages, indices = (t[first : first + step] for t in (chunk.pages, chunk.indices))
        count = min(len(pages) * tokens, chunk.positions - first * tokens)
        keys, values = (t[0, :, :count] for t in pool.gather(pages.unsqueeze(0)))
        at = (indices.unsqueeze(1) * tokens + slots).view(-1)[:count]
        _add(state, chunk, _attend(rows, keys, values, at, chunk, options, own=False))


def _add(state: AttentionState, chunk: Chunk, part: Part) -> None:
    out, lse = part
    state.add(chunk.rows, out.transpose(0, 1), lse.T)


def _lowest_seen(position: int, options: AttentionOptions) -> int:
    """The first position that a row at `position` sees."""
    low = 0
    if options.sliding_window is not None:
        low = max(low, position + 1 - options.sliding_window)
    if options.chunk is not None:
        low = max(low, position // options.chunk * options.chunk)
    return low


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    chunk: Chunk,
    options: AttentionOptions,
    *,
    own: bool,
) -> Part:
    """A chunk's rows over keys at positions `keys` [S]: its `own`, or others all before it."""
    hidden = _lowest_seen(chunk.end - 1, options) > 0
    if not hidden and options.softcap is None and _can_fuse(query, value):
        return _fused(query, key, value, options, causal=own)
    positions = torch.arange(chunk.start, chunk.end, device=query.device)
    out, lse = _empty(query, value)
    for row in range(0, query.shape[1], ROW_TILE):
        rows, seen = slice(row, row + ROW_TILE), slice(None)
        if own:
            low = _lowest_seen(chunk.start + row, options) - chunk.start
            seen = slice(max(0, low), row + ROW_TILE)
        tile = query[:, rows], key[:, seen], value[:, seen], positions[rows], keys[seen]
        out[:, rows], lse[:, rows] = _in_tiles(*tile, options)
    return out, lse


def _empty(query: torch.Tensor, value: torch.Tensor) -> Part:
    heads, rows, _ = query.shape
    out = torch.empty(heads, rows, value.shape[-1], device=query.device)
    return out, torch.empty(heads, rows, device=query.device)


def _in_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    options: AttentionOptions,
) -> Part:
    """A few rows at positions `rows` [n] over keys at positions `keys` [S]."""
    tiles = zip(key.split(KEY_TILE, 1), value.split(KEY_TILE, 1), keys.split(KEY_TILE))
    result: Part | None = None
    for some, theirs, at in tiles:
        seen = visible(rows.unsqueeze(1), at, options)
        part = masked_attention(query, some, theirs, seen, options)
        if result is not None:
            part = merge(*result, *part)
        result = part
    assert result is not None
    return result


def _can_fuse(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's flash attention takes these; on GPUs it is from compute capability 8 on."""
    dim = query.shape[-1]
    if dim != value.shape[-1]:
        return False
    if query.device.type == "cuda":
        half = query.dtype in (torch.bfloat16, torch.float16) and dim % 8 == 0 and dim <= 256
        return half and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return query.device.type == "cpu"


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: AttentionOptions,
    *,
    causal: bool,
) -> Part:
    """torch's own flash attention, asked for the log of the sum of exponentials, too."""
    kv_heads = key.shape[0]
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    # Each KV head is a batch entry that all its query heads share: nothing is repeated.
    rows = query.unflatten(0, (kv_heads, -1))
    keys, values = (t.unsqueeze(1).expand(-1, rows.shape[1], -1, -1) for t in (key, value))
    if query.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(rows, keys, values, 0.0, causal, scale=options.scaling)
    else:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = kernel(rows, keys, values, 0.0, causal, False, scale=options.scaling)[:2]
    return out.flatten(0, 1), lse.flatten(0, 1)
