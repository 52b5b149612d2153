"""The weight store: every weight has a home on one tier; streamed ones visit the device per sweep.

A unit is what is bound together: a decoder layer, or the output head. Its streamed bytes are one
slab, [from DISK | from HOST], so a unit costs a few large copies however many tensors it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offload.backend import DeviceBackend
from offload.expansion import Expansion
from offload.links import FileExtent, Link
from offload.raw_speed import RawCopy
from offload.slabs import DiskSlab, Slab, Weight
from offload.staging import StagingBuffers
from offload.tiers import STAGING_BUFFERS, Tier, staging_buffer_bytes
from offload.unit import Slot, Unit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offload.slabs import DiskSource
    from offload.transfer import Transfer
    from offload.transfer_engine import TransferEngine


class WeightStore:
    """Homes of all weights, and the ring of working memory that streamed units pass through.

    `units` lists the weights of every decoder layer and, last, of the output head. Weights in
    `resident` belong to no unit (final norm, position table) and stay on DEVICE; those in
    `gathered` (an embedding table of its own) have a home but are never streamed.
    """

    def __init__(
        self,
        units: Sequence[Sequence[Weight]],
        resident: Sequence[Weight],
        gathered: Sequence[Weight],
        tiers: Mapping[str, Tier],
        backend: DeviceBackend,
        transfers: TransferEngine,
        disk: DiskSource | None,
        depth: int,
        smallest_relay: int = 0,
        products: frozenset[str] = frozenset(),
    ) -> None:
        """`smallest_relay`: bytes of one buffer between disk and a separate device that others
        want, too; without any, there are buffers if weights come that way. `products`: names of
        weights that only their own `torch.nn.Linear` uses.
        """
        self._backend = backend
        self._transfers = transfers
        self._disk = disk
        self._views: dict[str, torch.Tensor | FileExtent] = {}
        self._homes: list[tuple[Tier, torch.Tensor]] = []
        self._weights = [*resident, *gathered, *(weight for unit in units for weight in unit)]
        self._resident = list(resident)
        self._next_bind = 0
        """Units bound so far, over all sweeps: a unit's deadline is counted in them."""
        here = {Tier.DEVICE, Tier.HOST} if backend.unified else {Tier.DEVICE}
        self._allocate_home(self._resident, Tier.DEVICE)
        self._units = [self._unit(unit, tiers, here) for unit in units]
        self.disk_bytes = sum(unit.disk.nbytes for unit in self._units)
        self.streamed_bytes = sum(unit.streamed_bytes for unit in self._units)
        """Bytes that cross a link to the device in every sweep; `disk_bytes` of them are read."""
        table = self._unit(gathered, tiers, here)
        for unit in (*self._units, table):
            if unit.host.nbytes:
                unit.host_home = self._allocate(Tier.HOST, unit.host.nbytes, "weights")
                self._views |= {w.name: view for w, view in unit.host.views(unit.host_home)}
        self._staging: list[torch.Tensor] = []
        self._make_rings(depth)
        self._make_relay(smallest_relay)
        self._expansion = self._make_expansion(products)
        for unit in (*self._units, table):
            self._bind_what_stays(unit)

    def _unit(self, unit: Sequence[Weight], tiers: Mapping[str, Tier], here: set[Tier]) -> Unit:
        def on(tier: Tier) -> list[Weight]:
            return [weight for weight in unit if tiers[weight.name] is tier]

        for tier in sorted(here):
            self._allocate_home(on(tier), tier)
        extents = {}
        if on_disk := on(Tier.DISK):
            assert self._disk is not None
            extents = {weight.name: self._disk.extent(weight.name) for weight in on_disk}
            self._views |= extents
        return Unit(
            stays=[weight for weight in unit if tiers[weight.name] in here],
            host=Slab([] if Tier.HOST in here else on(Tier.HOST)),
            disk=DiskSlab(on_disk, extents, shifted=not self._backend.unified),
        )

    def _allocate_home(self, weights: list[Weight], tier: Tier) -> None:
        slab = Slab(weights)
        if slab.nbytes:
            home = self._allocate(tier, slab.nbytes, "weights")
            self._views |= {weight.name: view for weight, view in slab.views(home)}

    def _make_rings(self, depth: int) -> None:
        # The head is often many times larger than a layer: a slot of its own keeps the ring small.
        *layers, head = self._units
        for units, count in ((layers, depth), ([head], 1)):
            size = max((unit.streamed_bytes for unit in units), default=0)
            if size:
                what = "working memory for streamed weights"
                ring = [Slot(self._allocate(Tier.DEVICE, size, what)) for _ in range(count)]
                for unit in units:
                    unit.ring = ring

    def _make_relay(self, smallest: int) -> None:
        largest = max(smallest, *(unit.disk.nbytes for unit in self._units))
        if largest and not self._backend.unified:
            size = staging_buffer_bytes(largest)
            what = "staging between disk and device"
            slab = self._allocate(Tier.HOST, STAGING_BUFFERS * size, what)
            self._staging = list(slab.split(size))
            self._transfers.use_staging(StagingBuffers(self._staging, self._backend))

    def _make_expansion(self, products: frozenset[str]) -> Expansion | None:
        """Where weights are not all stored in the type that is computed in."""
        largest = max(
            sum(weight.expanded_bytes for weight in (*u.stays, *u.host.weights, *u.disk.weights))
            for u in self._units
        )
        what = "weights in the type that is computed in"
        room = self._allocate(Tier.DEVICE, largest, what) if largest else None
        return None if room is None else Expansion(room, products)

    def _bind_what_stays(self, unit: Unit) -> None:
        for weight in unit.stays:
            if not weight.expanded_bytes:
                view = self._views[weight.name]
                assert isinstance(view, torch.Tensor)
                weight.bind(weight.parameter(view))

    def _allocate(self, tier: Tier, nbytes: int, what: str) -> torch.Tensor:
        home = self._backend.allocate(tier, nbytes, what)
        self._homes.append((tier, home))
        return home

    def view(self, name: str) -> torch.Tensor | FileExtent:
        """Where weight `name` is at home: uint8 [nbytes] in memory, or an extent."""
        return self._views[name]

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Put the values of weight `name` in its home, unless that is on DISK and thus filled."""
        home = self._views[name]
        if isinstance(home, torch.Tensor):
            home.copy_(tensor.contiguous().view(-1).view(torch.uint8))

    def finish_loading(self) -> None:
        """All homes are filled: bind what no unit has, in the type that is computed in."""
        for weight in self._resident:
            view = self._views[weight.name]
            assert isinstance(view, torch.Tensor)
            weight.bind(weight.expand(view))

    def prefetch(self, number: int) -> list[Transfer]:
        """Send the streamed weights of unit `number` on their way, unless they are already."""
        unit = self._units[number]
        if not unit.streamed_bytes or unit.slot is not None:
            return []
        slot = unit.slot = unit.ring.pop(0)
        unit.ring.append(slot)  # the one that was taken longest ago is free first
        deadline = self._next_bind + (number - self._next_bind) % len(self._units)
        options: dict[str, Any] = {"kind": "weights", "after": [slot.free]}
        options["priority"] = 1 + deadline
        unit.transfers = []
        for extent, place, padding in unit.disk.segments:
            target = slot.data[place : place + extent.nbytes]
            read = [(extent, target)]
            unit.transfers.append(
                self._transfers.submit_from_disk(read, padding=padding, **options)
            )
        if unit.host_home is not None:
            target = slot.data[unit.disk.nbytes : unit.streamed_bytes]
            unit.transfers.append(
                self._transfers.submit(Link.HOST_TO_DEVICE, unit.host_home, target, **options)
            )
        return unit.transfers

    def arrive(self, number: int) -> None:
        """Compute submitted from now on sees the weights of unit `number`."""
        for transfer in self._units[number].transfers:
            transfer.wait()

    def bind(self, number: int, rows: Sequence[int] = ()) -> None:
        """Make the weights of unit `number`, which have arrived, the model's parameters.

        `rows`: of each micro-batch that computes with them, where that is known.
        """
        unit = self._units[number]
        self._next_bind += 1
        data = None if unit.slot is None else unit.slot.data
        if self._expansion is not None:
            self._expansion.bind(self._not_bound(unit, data), rows)
            return
        if unit.slot is None:
            return
        bound = unit.slot.bound.get(number)
        if bound is None:
            arrived = self._not_bound(unit, data)
            bound = [(weight, weight.parameter(view)) for weight, view in arrived]
            unit.slot.bound[number] = bound
        for weight, parameter in bound:
            weight.bind(parameter)

    def _not_bound(
        self, unit: Unit, slot: torch.Tensor | None
    ) -> Iterable[tuple[Weight, torch.Tensor]]:
        """What is bound in every sweep, with its bytes: streamed ones are in `slot`."""
        # What is computed in the type that it is stored in is bound for good, and maybe reordered.
        for weight in unit.stays:
            if weight.expanded_bytes:
                view = self._views[weight.name]
                assert isinstance(view, torch.Tensor)
                yield weight, view
        if slot is not None:
            split = unit.disk.nbytes
            yield from unit.disk.views(slot[:split])
            yield from unit.host.views(slot[split : unit.streamed_bytes])

    def measure_products(self, most_rows: int, head_rows: int) -> None:
        """Find out on a GPU which weights are not worth expanding for few rows.

        Of up to `most_rows` rows, in the last unit `head_rows`. Only before the first prefetch.
        """
        if self._expansion is None:
            return
        for unit in self._units:
            slot = unit.ring[0].data if unit.streamed_bytes else None
            rows = head_rows if unit is self._units[-1] else most_rows
            self._expansion.measure(self._not_bound(unit, slot), rows)

    @property
    def expanded_bytes(self) -> int:
        """That weights were expanded to in all sweeps so far."""
        return 0 if self._expansion is None else self._expansion.expanded_bytes

    def release(self, number: int) -> None:
        """The compute submitted so far is the last that reads unit `number` in this sweep."""
        unit = self._units[number]
        if unit.slot is not None:
            unit.slot.free = self._backend.record()
            unit.slot = None
            unit.transfers = []

    def raw_copies(self) -> list[tuple[Link, list[RawCopy]]]:
        """Copies that show what the links in use can do; only before the first prefetch."""
        reads, sends = [], []
        for number, unit in enumerate(self._units):
            index = number % len(unit.ring) if unit.ring else 0
            # The head's one slot comes after those of the layers.
            buffer = index if number + 1 < len(self._units) else len(self._units)
            for extent, place, _ in unit.disk.segments:
                target = unit.ring[index].data[place : place + extent.nbytes]
                if not self._staging:
                    reads.append(RawCopy(extent, target, buffer))
                    continue
                for start in range(0, extent.nbytes, len(self._staging[0])):
                    staging = len(reads) % len(self._staging)
                    size = min(len(self._staging[0]), extent.nbytes - start)
                    piece = FileExtent(extent.file, extent.offset + start, size)
                    staged = self._staging[staging][:size]
                    reads.append(RawCopy(piece, staged, staging))
                    sends.append(RawCopy(staged, target[start : start + size], buffer))
            if unit.host_home is not None:
                target = unit.ring[index].data[: unit.host.nbytes]
                sends.append(RawCopy(unit.host_home, target, buffer))
        return [(self._backend.disk_in, reads), (Link.HOST_TO_DEVICE, sends)]

    def check_files(self) -> None:
        """Raise `OffloadStoreError` if a file that weights are read from was changed."""
        if self._disk is not None:
            self._disk.check_unchanged()

    def close(self) -> None:
        """Give all memory back."""
        for weight in self._weights:  # the model's parameters hold on to it, too
            weight.unbind()
        for tier, home in self._homes:
            self._backend.free(tier, home)
        self._homes.clear()
        self._views.clear()
        self._units.clear()
        self._expansion = None
        self._staging.clear()
