"""Attention with stock torch operations, for any device: the fallback of the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexrun.attention.interface import AttentionBackend
from flexrun.attention.reference import masked_attention, visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexrun.attention.state import Rows
    from flexrun.paused_forward import AttentionOptions
    from offload.kv_layout import DecodeBatch, KVGroup
    from offload.paged_kv import PagedKV


class TorchAttention(AttentionBackend):
    """Chunks of one sequence each, then decodes in batches of similar length."""

    chunk_rows = 2

    def prepare_few_rows(self, group: KVGroup) -> None:
        """See `AttentionBackend.prepare`."""
        group.decodes()

    def few_rows(
        self, query: torch.Tensor, group: KVGroup, pool: PagedKV, options: AttentionOptions
    ) -> Iterator[tuple[Rows, torch.Tensor, torch.Tensor]]:
        """See `AttentionBackend.few_rows`."""
        for batch in group.decodes():
            yield batch.rows, *decode(query, batch, pool, options)


def decode(
    query: torch.Tensor, batch: DecodeBatch, pool: PagedKV, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of each of B sequences: output [B, H, V] and log of the sum [B, H]."""
    keys, values = pool.gather(batch.pages, batch.memo)
    rows = query[:, batch.rows].transpose(0, 1).unsqueeze(2)  # [B, H, 1, D]
    reach = (options.sliding_window, options.chunk)
    if reach not in batch.memo:
        slots = torch.arange(pool.page_tokens, device=query.device)
        positions = (batch.indices.unsqueeze(2) * len(slots) + slots).flatten(1).unsqueeze(1)
        batch.memo[reach] = visible((batch.lengths - 1).view(-1, 1, 1), positions, options)
    seen = batch.memo[reach]
    out, lse = masked_attention(rows, keys, values, seen, options)
    return out.squeeze(2), lse.squeeze(2)
