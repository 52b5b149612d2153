"""KV pages in pinned RAM beside a device with memory of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offload.kv_staging import StagedPages, Visit
from offload.links import PageSlots, SomeRows
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload.paged_kv import PagedKV
    from offload.transfer import Transfer


class HostPages(StagedPages):
    """A pool per layer. All pages with content come; only new rows go back."""

    tier = Tier.HOST

    def __init__(self, pools: Sequence[PagedKV], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pools = list(pools)

    def fetch(self, visit: Visit) -> list[Transfer]:
        """Gathered into one copy."""
        if not visit.group.num_filled:
            return []
        return [self._gather(visit, self._pools[visit.layer].raw, visit.group.fetched, 0)]

    def keep(self, visit: Visit, packed: torch.Tensor) -> list[Transfer]:
        """The new rows, scattered into their pages when they have arrived."""
        self._make_way()
        home, staging, slots = self._pools[visit.layer], self.stagings[visit.turn], visit.group.home
        assert slots is not None
        staging.kept = [self._scatter(visit, packed, PageSlots(home, slots, staging.pinned_out))]
        self._leaving += staging.kept
        return staging.kept

    def keep_pages(
        self, visit: Visit, packed: torch.Tensor, numbers: torch.Tensor
    ) -> list[Transfer]:
        """As many at a time as staging has room for."""
        home, staging = self._pools[visit.layer].raw, self.stagings[visit.turn]
        assert staging.pinned_out is not None
        room = staging.pinned_out.nbytes // packed.shape[1]
        sent = []
        for pages, places in zip(packed.split(room), numbers.split(room)):
            self._make_way()
            target = SomeRows(home, places, torch.arange(len(places)), staging.pinned_out)
            staging.kept = [self._scatter(visit, pages, target)]
            self._leaving += staging.kept
            sent += staging.kept
        return sent

    def erase(self, pages: Sequence[int]) -> None:
        """Slots without a token are read, too, with weight zero."""
        super().erase(pages)
        for pool in self._pools:
            pool.raw[torch.tensor(pages)] = 0

    def close(self) -> None:
        """Let go of all memory."""
        super().close()
        self._pools.clear()
