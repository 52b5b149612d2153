"""Attention with stock torch operations, for any device: fused where torch has a fused kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from flexrun.attention.reference import masked_attention, visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexrun.paused_forward import AttentionOptions
    from offload.kv_layout import Chunk, DecodeBatch, KVGroup
    from offload.paged_kv import PagedKV

ROW_TILE = 256
"""Query rows per piece where scores are materialised: bounds them to heads x 256 x positions."""


class TorchAttention:
    """Chunks of one sequence each, then decodes in batches of similar length."""

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        groups: Sequence[tuple[KVGroup, PagedKV]],
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `AttentionBackend.run`."""
        heads, rows, _ = query.shape
        out = query.new_empty(rows, heads, value.shape[-1])
        for group, pool in groups:
            for chunk in group.chunks:
                result = attend_chunk(query, key, value, chunk, pool, options)
                out[chunk.rows] = result.transpose(0, 1)
            for batch in group.decodes:
                out[batch.rows] = self.decode(query, batch, pool, options)
        return out

    def decode(
        self, query: torch.Tensor, batch: DecodeBatch, pool: PagedKV, options: AttentionOptions
    ) -> torch.Tensor:
        """One row of each of B sequences: [B, H, V]."""
        keys, values = pool.gather(batch.pages, batch.memo)
        rows = query[:, batch.rows].transpose(0, 1).unsqueeze(2)  # [B, H, 1, D]
        reach = (options.sliding_window, options.chunk)
        if reach not in batch.memo:
            positions = torch.arange(keys.shape[2], device=query.device)
            batch.memo[reach] = visible((batch.lengths - 1).view(-1, 1, 1), positions, options)
        seen = batch.memo[reach]
        return masked_attention(rows, keys, values, seen, options).squeeze(2)


def attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk: Chunk,
    pool: PagedKV,
    options: AttentionOptions,
) -> torch.Tensor:
    """The rows of one chunk: [H, n, V]."""
    rows = query[:, chunk.rows]
    if chunk.start == 0:
        keys, values = key[:, chunk.rows], value[:, chunk.rows]
    else:
        keys, values = (t[0, :, : chunk.end] for t in pool.gather(chunk.pages.unsqueeze(0)))
    window_hides = options.sliding_window is not None and options.sliding_window < chunk.end
    chunk_hides = options.chunk is not None and options.chunk < chunk.end
    if window_hides or chunk_hides or options.softcap is not None or options.sinks is not None:
        return _attend_in_tiles(rows, keys, values, chunk.start, options)
    return _attend_fused(rows, keys, values, chunk.start, options.scaling)


def _attend_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, scaling: float
) -> torch.Tensor:
    groups = query.shape[0] // key.shape[0]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 0) for t in (key, value))
    mask = None
    if start:
        positions = torch.arange(key.shape[1], device=query.device)
        mask = positions <= positions[start:].unsqueeze(1)
    return F.scaled_dot_product_attention(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
    )[0]


def _attend_in_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Tiles of query rows, each with just the positions that its window can reach."""
    pieces = []
    for row in range(0, query.shape[1], ROW_TILE):
        piece = query[:, row : row + ROW_TILE]
        first, last = start + row, start + row + piece.shape[1]
        low = 0 if options.sliding_window is None else max(0, first + 1 - options.sliding_window)
        if options.chunk is not None:
            low = max(low, first // options.chunk * options.chunk)
        positions = torch.arange(low, last, device=query.device)
        seen = visible(positions[first - low :].unsqueeze(1), positions, options)
        tile_keys, tile_values = key[:, low:last], value[:, low:last]
        pieces.append(masked_attention(piece, tile_keys, tile_values, seen, options))
    return torch.cat(pieces, 1)
