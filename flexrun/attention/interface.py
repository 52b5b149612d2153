"""What the executor asks of an attention backend, and what all of them do alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from compression.rotation import rotated
from flexrun.attention.prefill import attend_chunk
from flexrun.attention.state import AttentionState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flexrun.attention.centres import Centres
    from flexrun.attention.state import Rows
    from flexrun.paused_forward import AttentionOptions
    from offload.kv_layout import KVGroup
    from offload.paged_kv import PagedKV


class AttentionBackend(ABC):
    """Exact attention of packed, ragged rows over pages that already hold the rows' own keys.

    Every group is attended to where it lies, and the parts are merged: see `AttentionState`.
    """

    chunk_rows: int
    """Spans of at least so many rows are products of large matrices: see `attend_chunk`."""

    def prepare(self, groups: Sequence[KVGroup]) -> None:
        """Make what depends on a micro-batch's rows alone, before anything of a sweep computes.

        On a GPU, index tensors that are made later wait for what was submitted until then.
        """
        for group in groups:
            group.chunks(self.chunk_rows)
            self.prepare_few_rows(group)

    def prepare_few_rows(self, group: KVGroup) -> None:
        """What `few_rows` needs of it."""
        group.paged(below=self.chunk_rows)

    def parts(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        groups: Sequence[tuple[KVGroup, PagedKV]],
        options: AttentionOptions,
        centres: Centres | None = None,
    ) -> AttentionState:
        """Attend: what `groups` give, merged; other parts may be added before it is finished.

        query [query_heads, rows, key_dim], key and value [kv_heads, rows, ...] are the rows of one
        micro-batch; every row sees the positions of its own sequence up to itself. `centres`: of
        packed pages.
        """
        heads, rows, _ = query.shape
        found, turned = (
            AttentionState(rows, heads, value.shape[-1], query.device) for _ in range(2)
        )
        any_turned = any(pool.format.rotated for _, pool in groups)
        turned_query = rotated(query) if any_turned else query
        for group, pool in groups:
            state, asked = (turned, turned_query) if pool.format.rotated else (found, query)
            for chunk in group.chunks(self.chunk_rows):
                attend_chunk(state, asked, key, value, chunk, pool, options)
            for part in self.few_rows(asked, group, pool, options):
                state.add(*part)
        if turned.part is not None:
            out, lse = turned.part
            out = rotated(out, torch.float32)
            if centres is not None:
                out, lse = centres.undone(query, slice(None), out, lse, options)
            found.add(slice(None), out, lse)
        return found

    @abstractmethod
    def few_rows(
        self, query: torch.Tensor, group: KVGroup, pool: PagedKV, options: AttentionOptions
    ) -> Iterator[tuple[Rows, torch.Tensor, torch.Tensor]]:
        """Spans of fewer rows, over a group's pages: rows, output and log-sum-exp of each part."""

    def close(self) -> None:
        """Give back threads."""
