"""Pages copied from one place to another: for a sequence of their own, or to another tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from offload.links import FileExtent, Link
from offload.page_table import Page
from offload.raw_speed import AT_LEAST, RawCopy
from offload.tiers import Tier
from offload.transfer import URGENT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload.backend import DeviceBackend
    from offload.kv_disk import DiskPages
    from offload.kv_recent import RecentPages
    from offload.page_table import PageCopy
    from offload.paged_kv import PagedKV
    from offload.pages import PagePools
    from offload.transfer import Transfer
    from offload.transfer_engine import TransferEngine


@dataclass(frozen=True, slots=True)
class PagePlaces:
    """Where pages lie."""

    memory: Mapping[Tier, Sequence[PagedKV]]
    """Pools in memory by layer."""
    disk: DiskPages | None
    recent: RecentPages | None = None
    """Tails where every sequence has one; else only those with pages on DISK have."""

    def of(
        self, page: Page, layer: int, tail: int | None = None, *, first: bool = False
    ) -> torch.Tensor | FileExtent:
        """One layer of a page: uint8, or an extent of the file."""
        if tail is not None and self.recent is not None:
            return self.recent.page(layer, tail, first=first)
        if page.tier is not Tier.DISK:
            return self.memory[page.tier][layer].raw[page.number].view(torch.uint8)
        assert self.disk is not None
        return self.disk.page(layer, page.number) if tail is None else self.disk.tail(layer, tail)


def copy_pages(
    copies: Sequence[PageCopy],
    layer: int,
    places: PagePlaces,
    backend: DeviceBackend,
    transfers: TransferEngine,
    after: Sequence[Transfer],
) -> list[Transfer]:
    """Copy one layer's pages; what is to read or write them has to wait for the transfers.

    From a separate device pages go to the device or to HOST, not to DISK. `after` is what still
    stores rows in this layer.
    """

    def tier_of(page: Page, tail: int | None) -> Tier:
        if tail is not None and places.recent is not None:
            return Tier.DEVICE
        if page.tier is Tier.DISK and tail is None:
            return Tier.DISK
        # A tail is in RAM, and RAM may be the device's own memory.
        return Tier.DEVICE if page.tier is Tier.DEVICE or backend.unified else Tier.HOST

    started = []
    for copy in copies:
        source = places.of(copy.source, layer, copy.from_tail, first=copy.first)
        target = places.of(copy.target, layer, copy.to_tail, first=copy.first)
        if copy.first and places.recent is not None:
            assert copy.from_tail is not None
            assert copy.to_tail is not None
            places.recent.copy_centre(layer, copy.from_tail, copy.to_tail)
        way = tier_of(copy.source, copy.from_tail), tier_of(copy.target, copy.to_tail)
        started.append(_copy(source, target, way, backend, transfers, after))
    return [transfer for transfer in started if transfer is not None]


def _copy(
    source: torch.Tensor | FileExtent,
    target: torch.Tensor | FileExtent,
    way: tuple[Tier, Tier],
    backend: DeviceBackend,
    transfers: TransferEngine,
    after: Sequence[Transfer],
) -> Transfer | None:
    # What was computed until now may read or write the same pages of the device.
    order: dict[str, Any] = {"after": [*after, backend.record()], "kind": "kv", "priority": URGENT}
    if isinstance(source, FileExtent):
        assert isinstance(target, torch.Tensor)
        if way[1] is Tier.HOST:
            return transfers.submit(Link.DISK_TO_HOST, source, target, **order)
        return transfers.submit_from_disk([(source, target)], **order)
    if isinstance(target, FileExtent):
        assert backend.unified or way[0] is Tier.HOST
        return transfers.submit_to_disk([(source, target)], **order)
    if way == (Tier.HOST, Tier.DEVICE):
        return transfers.submit(Link.HOST_TO_DEVICE, source, target, **order)
    if way == (Tier.DEVICE, Tier.HOST):
        return transfers.submit(Link.DEVICE_TO_HOST, source, target, **order)
    for transfer in after if way[0] is not Tier.DEVICE or backend.unified else ():
        transfer.synchronize()  # from the last sweep: it is over long since
    target.copy_(source)
    return None


def swap_copies(pools: PagePools, places: PagePlaces) -> list[tuple[Link, list[RawCopy]]]:
    """Some pages of the device and places on the swap tier, with the link between them."""
    swap = pools.swap
    if swap is None:
        return []
    count = min(AT_LEAST, pools.capacity[swap], pools.capacity[Tier.DEVICE])
    link = Link.DEVICE_TO_HOST if swap is Tier.HOST else Link.HOST_TO_DISK

    def raw(number: int) -> RawCopy:
        source, target = (places.of(Page(tier, number), 0) for tier in (Tier.DEVICE, swap))
        return RawCopy(source, target, number)

    return [(link, [raw(number) for number in range(count)])]
