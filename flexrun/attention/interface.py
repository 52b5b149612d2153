"""What the executor asks of an attention backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from flexrun.paused_forward import AttentionOptions
    from offload.kv_layout import KVGroup
    from offload.paged_kv import PagedKV


class AttentionBackend(Protocol):
    """Exact attention of packed, ragged rows over pages that already hold the rows' own keys.

    Every group is attended to where it lies, and the parts are merged: see `AttentionState`.
    """

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        groups: Sequence[tuple[KVGroup, PagedKV]],
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attend.

        query [query_heads, rows, key_dim], key and value [kv_heads, rows, ...] are the rows of one
        micro-batch; every row sees the positions of its own sequence up to itself. Returns
        [rows, query_heads, value_dim].
        """
        ...

    def close(self) -> None:
        """Give back threads."""
        ...
