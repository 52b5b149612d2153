"""Attention of many rows of one sequence, with stock torch operations, in bounded memory.

Legend: H = query heads, K = KV heads, n = query rows, S = keys, D and V = sizes of key and value.
"""

from __future__ import annotations

from bisect import bisect_right
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
    """Output [H, n, V] and log of the sum of exponentials [H, n], float32."""

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
        _add(
            state, chunk, _over_own(rows, key[:, chunk.rows], value[:, chunk.rows], chunk, options)
        )
    tokens = pool.keys.shape[2]
    slots = torch.arange(tokens, device=query.device)
    step = max(1, GATHERED // tokens)
    for first in range(_first_page(chunk, tokens, options), len(chunk.pages), step):
        pages, indices = (t[first : first + step] for t in (chunk.pages, chunk.indices))
        count = min(len(pages) * tokens, chunk.positions - first * tokens)
        keys, values = (t[0, :, :count] for t in pool.gather(pages.unsqueeze(0)))
        at = (indices.unsqueeze(1) * tokens + slots).view(-1)[:count]
        _add(state, chunk, _over_earlier(rows, keys, values, at, chunk, options))


def _add(state: AttentionState, chunk: Chunk, part: Part) -> None:
    out, lse = part
    state.add(chunk.rows, out.transpose(0, 1), lse.T)


def _first_page(chunk: Chunk, tokens: int, options: AttentionOptions) -> int:
    """The first of the chunk's pages that its first row sees a position of."""
    low = 0
    if options.sliding_window is not None:
        low = chunk.start + 1 - options.sliding_window
    if options.chunk is not None:
        low = max(low, chunk.start // options.chunk * options.chunk)
    # The page before the first that starts beyond `low` may have it.
    return max(0, bisect_right(chunk.table, max(0, low) // tokens) - 1)


def _hides(chunk: Chunk, options: AttentionOptions) -> bool:
    """Whether some row does not see all positions before it."""
    reaches = (options.sliding_window, options.chunk)
    return any(reach is not None and reach < chunk.end for reach in reaches)


def _over_own(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk: Chunk,
    options: AttentionOptions,
) -> Part:
    if not _hides(chunk, options) and options.softcap is None and _can_fuse(query, value):
        return _fused(query, key, value, options, causal=True)
    positions = torch.arange(chunk.start, chunk.end, device=query.device)
    out, lse = _empty(query, value)
    for row in range(0, query.shape[1], ROW_TILE):
        last = min(row + ROW_TILE, query.shape[1])
        low = 0
        if options.sliding_window is not None:
            low = max(0, row + 1 - options.sliding_window)
        if options.chunk is not None:
            low = max(low, (chunk.start + row) // options.chunk * options.chunk - chunk.start)
        keys = slice(low, last)
        rows = query[:, row:last]
        tile = rows, key[:, keys], value[:, keys], positions[row:last], positions[keys]
        out[:, row:last], lse[:, row:last] = _in_tiles(*tile, options)
    return out, lse


def _over_earlier(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    chunk: Chunk,
    options: AttentionOptions,
) -> Part:
    """Over keys at positions `keys` [S], all before the chunk."""
    if not _hides(chunk, options) and options.softcap is None and _can_fuse(query, value):
        return _fused(query, key, value, options, causal=False)
    positions = torch.arange(chunk.start, chunk.end, device=query.device)
    out, lse = _empty(query, value)
    for row in range(0, query.shape[1], ROW_TILE):
        rows = slice(row, row + ROW_TILE)
        tile = query[:, rows], key, value, positions[rows], keys
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
    half = query.dtype in (torch.bfloat16, torch.float16)
    fused = query.device.type == "cpu" or (query.device.type == "cuda" and half)
    return fused and query.shape[-1] == value.shape[-1]


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
    # Each KV head is a batch entry that all its query heads share: nothing is repeated.
    rows = query.unflatten(0, (kv_heads, -1))
    keys, values = (t.unsqueeze(1).expand(-1, rows.shape[1], -1, -1) for t in (key, value))
    if query.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(rows, keys, values, 0.0, causal, scale=options.scaling)
    else:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = kernel(rows, keys, values, 0.0, causal, False, scale=options.scaling)[:2]
    return out.flatten(0, 1).float(), lse.flatten(0, 1)
