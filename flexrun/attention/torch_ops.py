"""Attention with stock torch operations, for any device: the fallback of the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexrun.attention.prefill import attend_chunk
from flexrun.attention.reference import masked_attention, visible
from flexrun.attention.state import AttentionState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexrun.paused_forward import AttentionOptions
    from offload.kv_layout import DecodeBatch, KVGroup
    from offload.paged_kv import PagedKV


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
        state = AttentionState(rows, heads, value.shape[-1], query.device)
        for group, pool in groups:
            for chunk in group.chunks(fewest=2):
                attend_chunk(state, query, key, value, chunk, pool, options)
            for batch in group.decodes():
                state.add(batch.rows, *decode(query, batch, pool, options))
        return state.finish(options.sinks, query.dtype)

    def close(self) -> None:
        """See `AttentionBackend.close`."""


def decode(
    query: torch.Tensor, batch: DecodeBatch, pool: PagedKV, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of each of B sequences: output [B, H, V] and log of the sum [B, H]."""
    keys, values = pool.gather(batch.pages, batch.memo)
    rows = query[:, batch.rows].transpose(0, 1).unsqueeze(2)  # [B, H, 1, D]
    reach = (options.sliding_window, options.chunk)
    if reach not in batch.memo:
        slots = torch.arange(pool.keys.shape[2], device=query.device)
        positions = (batch.indices.unsqueeze(2) * len(slots) + slots).flatten(1).unsqueeze(1)
        batch.memo[reach] = visible((batch.lengths - 1).view(-1, 1, 1), positions, options)
    seen = batch.memo[reach]
    out, lse = masked_attention(rows, keys, values, seen, options)
    return out.squeeze(2), lse.squeeze(2)
