"""The KV cache: one page pool per tier and layer, and the way of its pages to attention."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from offload.kv_batches import KVBatch, KVPlanner
from offload.kv_copies import PagePlaces, copy_pages, swap_copies
from offload.kv_disk import DiskPages
from offload.kv_host import HostPages
from offload.kv_memory import KVMemory
from offload.kv_recent import RecentPages
from offload.kv_staging import StagedPages, Visit
from offload.links import Link
from offload.paged_kv import KVFormat, PagedKV
from offload.raw_speed import RawCopy
from offload.tiers import REQUEST_BYTES, TURNS, Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from compression.spec import GroupFormat
    from offload.backend import DeviceBackend
    from offload.kv_batches import Span
    from offload.kv_hosted import HostedRows
    from offload.kv_layout import KVGroup
    from offload.page_table import PageCopy
    from offload.paged_kv import LayerShape
    from offload.pages import PagePools
    from offload.transfer import Transfer
    from offload.transfer_engine import TransferEngine


class KVCache:
    """Keys and values of all sequences, and their way to where attention runs."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        dtype: torch.dtype,
        pools: PagePools,
        backend: DeviceBackend,
        transfers: TransferEngine,
        staging_pages: int,
        gathered_tokens: int = 16384,
        directory: Path | None = None,
        groups: GroupFormat | None = None,
        centred: bool = True,
    ) -> None:
        """`staging_pages` per staged tier and turn; the file of DISK pages lies in `directory`.

        With `groups` full pages are stored in few bits; keys without their `centred` part.
        """
        self._pools = pools
        self._backend = backend
        self._transfers = transfers
        self._memory = KVMemory(shapes, KVFormat(dtype, groups), pools.page_tokens, backend)
        self._layers: dict[Tier, list[PagedKV]] = {}
        """Pages in memory."""
        self._staged: dict[Tier, StagedPages] = {}
        """Those that attention does not read where they are."""
        self._recent: RecentPages | None = None
        self._batches: list[KVBatch] = []
        self._arriving: dict[tuple[int, int], list[Transfer]] = {}
        """By layer and micro-batch."""
        self._copies: list[PageCopy] = []
        self._copying: dict[int, list[Transfer]] = {}
        """What copies the pages of a layer, in this sweep."""
        self._new: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        """What stores new rows, by layer and micro-batch, until the layer has run."""
        self._last_store: dict[int, list[Transfer]] = {}
        self._earlier_store: dict[int, list[Transfer]] = {}
        """By layer, before this sweep: within one, no sequence reads what another one stores."""
        pools.on_change = self._memory.charge
        try:
            for tier, pages in pools.capacity.items():
                if pages and tier is not Tier.DISK:
                    self._layers[tier] = self._memory.home(tier, pages)
            self._add_staged(staging_pages, directory)
            if pools.keeps_recent:
                self._recent = RecentPages(self._memory, pools.tails, centred=centred)
            self._planner = KVPlanner(
                pools,
                backend.device,
                self._staged.keys(),
                staging_pages,
                gathered_tokens,
                self._memory.page_bytes,
            )
        except BaseException:
            self.close()
            raise

    @property
    def format(self) -> KVFormat:
        """How pages are stored when they are full."""
        return self._memory.format

    def _add_staged(self, pages: int, directory: Path | None) -> None:
        capacity, swap = self._pools.capacity, self._pools.swap
        pages = 0 if swap is Tier.DISK else pages  # nobody attends to pages on the swap tier
        common = self._memory, pages, self._transfers
        if capacity.get(Tier.HOST) and not (self._backend.unified or swap is Tier.HOST):
            self._staged[Tier.HOST] = HostPages(self._layers[Tier.HOST], *common)
        if on_disk := capacity.get(Tier.DISK):
            assert directory is not None
            tails = 0 if self._pools.keeps_recent else self._pools.tails
            self._staged[Tier.DISK] = DiskPages(directory, on_disk, tails, *common)

    def erase(self, sequence: int) -> None:
        """Zero the pages of a sequence whose values may not be numbers, before others get them."""
        table = self._pools.tables.get(sequence)
        if table is None:
            return
        for stores in self._last_store.values():
            for store in stores:
                store.synchronize()  # or they would write the same values again
        for tier, pages in self._pools.pages_to_erase(sequence).items():
            if (staged := self._staged.get(tier)) is not None:
                staged.erase(pages)
                continue
            for pool in self._layers[tier]:
                pool.raw[torch.tensor(pages, device=pool.raw.device)] = 0
        if self._recent is not None and table.tail is not None:
            self._recent.erase(table.tail)

    def raw_copies(self) -> list[tuple[Link, list[RawCopy]]]:
        """Copies that show what the link from HOST can do; only before the first sweep."""
        pages = self._layers[Tier.HOST][0].raw.view(-1).view(torch.uint8)
        target = self._staged[Tier.HOST].stagings[0].device.view(torch.uint8)
        size = min(len(pages), len(target), REQUEST_BYTES)
        return [(Link.HOST_TO_DEVICE, [RawCopy(pages[:size], target[:size], 0)])]

    def swap_copies(self) -> list[tuple[Link, list[RawCopy]]]:
        """Copies that show what the link to the swap tier can do; only before the first sweep."""
        return swap_copies(self._pools, self._places())

    def begin(self, micro_batches: Sequence[Sequence[Span]]) -> None:
        """Prepare the index tensors of a sweep's micro-batches (each a sequence of spans)."""
        self._earlier_store = dict(self._last_store)
        for each in (self._arriving, self._new, self._copying):
            each.clear()
        self._copies = self._pools.take_copies()
        self._batches = self._planner.plan(micro_batches)

    def _turn(self, layer: int, number: int) -> int:
        return (layer * len(self._batches) + number) % TURNS

    def _visit(self, layer: int, number: int, group: KVGroup) -> Visit:
        return Visit(layer, self._turn(layer, number), group, self.earlier_stores(layer))

    def fetch(self, layer: int, number: int) -> list[Transfer]:
        """Send the pages of a micro-batch's layer that have to move to the device's staging."""
        if layer not in self._copying:
            self._copying[layer] = self._copy_pages(layer)
        transfers = [
            transfer
            for group in self._batches[number].groups
            if group.staged
            for transfer in self._staged[group.tier].fetch(self._visit(layer, number, group))
        ]
        self._arriving[layer, number] = [*transfers, *self._copying[layer]]
        return self._arriving[layer, number]

    def _copy_pages(self, layer: int) -> list[Transfer]:
        if not self._copies:
            return []
        earlier = self._earlier_store.get(layer, ())
        places = self._copies, layer, self._places()
        return copy_pages(*places, self._backend, self._transfers, earlier)

    def _places(self) -> PagePlaces:
        disk = self._staged.get(Tier.DISK)
        assert disk is None or isinstance(disk, DiskPages)
        return PagePlaces(self._layers, disk, self._recent)

    def arriving(self, layer: int, number: int) -> list[Transfer]:
        """What `append` will wait for: the pages of a micro-batch that had to move."""
        return self._arriving.get((layer, number), [])

    def append(self, layer: int, number: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write new `key` [kv_heads, rows, key_dim] and `value` into the pages attention reads."""
        for transfer in self.arriving(layer, number):
            transfer.wait()
        key, value = key.transpose(0, 1), value.transpose(0, 1)  # [rows, kv_heads, dim]
        if self._recent is not None and (recent := self._batches[number].recent) is not None:
            self._recent.keep(layer, number, recent, (key, value))
        for group, pool in self.view(layer, number):
            visit, staged = self._visit(layer, number, group), self._staged.get(group.tier)
            if staged is not None:
                staged.arrive(visit)
            if not len(group.rows):
                continue  # only earlier positions are there
            # A group of all rows needs no gather.
            whole = group.rows.shape[0] == key.shape[0]
            new = (key, value) if whole else (key[group.rows], value[group.rows])
            packed = pool.pack(*new)
            pool.store(group.slots, packed)
            if staged is not None:
                self._new[layer, number] += staged.keep(visit, packed)

    def view(self, layer: int, number: int) -> list[tuple[KVGroup, PagedKV]]:
        """The rows of a micro-batch by pool, with the pool of `layer`."""
        turn, batch = self._turn(layer, number), self._batches[number]
        found = [
            (
                group,
                self._staged[group.tier].pool(layer, turn)
                if group.staged
                else self._layers[group.tier][layer],
            )
            for group in batch.groups
        ]
        if self._recent is not None and batch.recent is not None:
            found.append((batch.recent.group, self._recent.pools[layer]))
        return found

    def centres(self, layer: int, number: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What packed keys and values lack, for every row, if some of them are attended to."""
        batch = self._batches[number]
        if self._recent is None or batch.recent is None or not (batch.groups or batch.hosted):
            return None
        return self._recent.centres_of(layer, batch.recent)

    def attend_on_host(self, share: Callable[[int], float]) -> None:
        """Let HOST attend to pages there for single rows: see `KVPlanner.host_share`."""
        self._planner.host_share = share

    def groups(self, number: int) -> list[KVGroup]:
        """What the device does with the pages of a micro-batch."""
        return self._batches[number].attended

    def hosted(self, number: int) -> HostedRows | None:
        """The rows of a micro-batch that attend to pages on HOST there."""
        return self._batches[number].hosted

    @property
    def any_hosted(self) -> bool:
        """Whether some of this sweep's rows do."""
        return any(batch.hosted is not None for batch in self._batches)

    def pool(self, tier: Tier, layer: int) -> PagedKV:
        """All pages of a layer on `tier`."""
        return self._layers[tier][layer]

    def earlier_stores(self, layer: int) -> Sequence[Transfer]:
        """What stored or copied pages of this layer: who reads them comes after it."""
        return [*self._earlier_store.get(layer, ()), *self._copying.get(layer, ())]

    def add_store(self, layer: int, number: int, transfer: Transfer) -> None:
        """`transfer` stores new rows of a micro-batch on HOST."""
        self._new[layer, number].append(transfer)

    def store(self, layer: int, number: int) -> list[Transfer]:
        """The layer has run: its staging may be reused, its new rows are on their way."""
        self._arriving.pop((layer, number), None)
        for group in self._batches[number].groups:
            if group.staged:
                self._staged[group.tier].release(self._turn(layer, number))
        stored = self._new.pop((layer, number), []) + self._pack(layer, number)
        if stored:
            under_way = []
            for transfer in self._last_store.get(layer, []):
                if transfer.issued:
                    transfer.wait()  # raises what the copy raised
                else:
                    under_way.append(transfer)
            self._last_store[layer] = [*under_way, *stored]
        return stored

    def _pack(self, layer: int, number: int) -> list[Transfer]:
        """Send pages that are full now to their tiers."""
        recent, sent = self._batches[number].recent, []
        if recent is None or self._recent is None:
            return []
        for pages, packed in self._recent.pack(layer, number, recent):
            if (staged := self._staged.get(pages.tier)) is not None:
                visit = self._visit(layer, number, recent.group)
                sent += staged.keep_pages(visit, packed, pages.numbers)
            else:
                self._layers[pages.tier][layer].raw.index_copy_(0, pages.numbers, packed)
        return sent

    def close(self) -> None:
        """Give all memory back, also the pages of sequences that were broken off."""
        for sequence in list(self._pools.tables):
            self._pools.release(sequence)
        self._pools.take_copies()
        self._pools.settle()
        for staged in self._staged.values():
            staged.close()
        if self._recent is not None:
            self._recent.close()
        self._memory.close()
        for each in (self._layers, self._staged, self._batches, self._arriving):
            each.clear()
