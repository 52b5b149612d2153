"""KV pages in pinned RAM beside a device with memory of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offload.kv_staging import StagedPages
from offload.links import Link, PageSlots, TensorRows
from offload.tiers import Tier
from offload.transfer import URGENT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload.kv_layout import KVGroup
    from offload.paged_kv import PagedKV
    from offload.transfer import Transfer


class HostPages(StagedPages):
    """A pool per layer. All pages with content come; only new rows go back."""

    tier = Tier.HOST

    def __init__(self, pools: Sequence[PagedKV], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pools = list(pools)
        what = "staging for KV pages"
        self._pinned_in, self._pinned_out = (
            [self._allocate(Tier.HOST, self._elements, what) for _ in self.stagings]
            for _ in range(2)
        )
        self._kept: list[list[Transfer]] = [[] for _ in self.stagings]
        """The last copy through each `pinned_out`, which is free when its rows are scattered."""

    def fetch(
        self, layer: int, turn: int, group: KVGroup, after: Sequence[Transfer]
    ) -> list[Transfer]:
        """Gathered into one copy."""
        if not len(group.fetched):
            return []
        rows = TensorRows(self._pools[layer].raw, group.fetched, self._pinned_in[turn])
        return [
            self._transfers.submit(
                Link.HOST_TO_DEVICE,
                rows,
                self.pool(layer, turn).raw[: group.num_filled],
                kind="kv",
                after=self._before_fetch(turn, after),
                priority=URGENT,
            )
        ]

    def keep(
        self,
        layer: int,
        turn: int,
        group: KVGroup,
        keys: torch.Tensor,
        values: torch.Tensor,
        after: Sequence[Transfer],
    ) -> list[Transfer]:
        """The new rows, scattered into their pages when they have arrived."""
        home, staging = self._pools[layer], self._pinned_out[turn]
        assert group.home_pages is not None
        assert group.home_offsets is not None
        slots = PageSlots(home.keys, home.values, group.home_pages, group.home_offsets, staging)
        stored = self._transfers.submit(
            Link.DEVICE_TO_HOST,
            torch.cat([keys.flatten(1), values.flatten(1)], 1),
            slots,
            kind="kv",
            after=[self._backend.record(), *self._kept[turn], *after],
        )
        self._kept[turn] = [stored]
        return [stored]

    def erase(self, pages: Sequence[int]) -> None:
        """Slots without a token are read, too, with weight zero."""
        super().erase(pages)
        for pool in self._pools:
            pool.raw[torch.tensor(pages)] = 0

    def close(self) -> None:
        """Let go of all memory."""
        super().close()
        for each in (self._pools, self._pinned_in, self._pinned_out, self._kept):
            each.clear()
