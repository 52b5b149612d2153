"""The weight store: every weight has a home on one tier; streamed ones visit the device per sweep.

A unit is what is bound together: a decoder layer, or the output head. Its streamed bytes are one
slab, [from HOST | from DISK], so a unit costs one or two large copies however many tensors it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from offload.backend import DeviceBackend
from offload.links import FileExtent, Link
from offload.tiers import CACHE_LINE, Tier, padded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offload.offload_file import OffloadFile
    from offload.transfer import Transfer, TransferEngine


@dataclass(frozen=True, slots=True)
class Weight:
    """One stored tensor and the module attributes that use it (several when it is tied)."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    users: tuple[tuple[torch.nn.Module, str], ...]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def bind(self, data: torch.Tensor) -> None:
        """Make `data` (uint8 [nbytes]) the parameter's storage."""
        parameter = self.parameter(data)
        for module, attribute in self.users:
            module._parameters[attribute] = parameter

    def parameter(self, data: torch.Tensor) -> torch.nn.Parameter:
        """`data` seen as this tensor."""
        return torch.nn.Parameter(data.view(self.dtype).view(self.shape), requires_grad=False)


@dataclass(slots=True)
class Slab:
    """Weights laid out one after another in one buffer or file extent."""

    weights: list[Weight]
    offsets: list[int] = field(default_factory=list)
    nbytes: int = 0

    def __post_init__(self) -> None:
        for weight in self.weights:
            self.offsets.append(self.nbytes)
            self.nbytes += padded(weight.nbytes, CACHE_LINE)

    def views(self, data: torch.Tensor) -> Iterable[tuple[Weight, torch.Tensor]]:
        """Each weight with its bytes in `data` (uint8 [nbytes])."""
        for weight, offset in zip(self.weights, self.offsets):
            yield weight, data[offset : offset + weight.nbytes]


@dataclass(slots=True)
class _Slot:
    """Working memory for one unit's streamed bytes, and the HOST staging its disk part passes."""

    data: torch.Tensor
    staging: torch.Tensor | None
    free: Any = None
    """Event after which the bytes may be overwritten."""
    last: Transfer | None = None
    """The transfer that reads `staging`."""
    bound: dict[int, list[tuple[torch.nn.Module, str, torch.nn.Parameter]]] = field(
        default_factory=dict
    )


@dataclass(slots=True)
class _Unit:
    host: Slab
    disk: Slab
    host_home: torch.Tensor | None = None
    disk_home: FileExtent | None = None
    ring: list[_Slot] = field(default_factory=list)
    slot: _Slot | None = None
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def streamed_bytes(self) -> int:
        return self.host.nbytes + self.disk.nbytes


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
        file: OffloadFile | None,
        depth: int,
    ) -> None:
        self._backend = backend
        self._transfers = transfers
        self._views: dict[str, torch.Tensor | FileExtent] = {}
        self._homes: list[tuple[Tier, torch.Tensor]] = []
        self._weights = [*resident, *gathered, *(weight for unit in units for weight in unit)]
        stays = {Tier.DEVICE, Tier.HOST} if backend.unified else {Tier.DEVICE}
        self._allocate_resident(list(resident), Tier.DEVICE)
        for unit in (*units, gathered):
            for tier in stays:
                self._allocate_resident([w for w in unit if tiers[w.name] is tier], tier)

        def streamed(unit: Sequence[Weight], tier: Tier) -> Slab:
            return Slab([w for w in unit if tiers[w.name] is tier and tier not in stays])

        self._units = [_Unit(streamed(u, Tier.HOST), streamed(u, Tier.DISK)) for u in units]
        table = _Unit(streamed(gathered, Tier.HOST), streamed(gathered, Tier.DISK))
        for unit_homes in (*self._units, table):
            self._allocate_streamed(unit_homes, file)
        self._make_rings(depth)

    def _allocate_resident(self, weights: list[Weight], tier: Tier) -> None:
        slab = Slab(weights)
        if not slab.nbytes:
            return
        home = self._allocate(tier, slab.nbytes, "weights")
        for weight, view in slab.views(home):
            self._views[weight.name] = view
            weight.bind(view)

    def _allocate_streamed(self, unit: _Unit, file: OffloadFile | None) -> None:
        if unit.host.nbytes:
            unit.host_home = self._allocate(Tier.HOST, unit.host.nbytes, "weights")
            self._views |= {w.name: v for w, v in unit.host.views(unit.host_home)}
        if unit.disk.nbytes:
            assert file is not None
            unit.disk_home = file.extent(unit.disk.nbytes)
            start = unit.disk_home.offset
            for weight, offset in zip(unit.disk.weights, unit.disk.offsets):
                self._views[weight.name] = FileExtent(file, start + offset, weight.nbytes)

    def _make_rings(self, depth: int) -> None:
        # The head is often many times larger than a layer: a slot of its own keeps the ring small.
        *layers, head = self._units
        for units, count in ((layers, depth), ([head], 1)):
            size = max((unit.streamed_bytes for unit in units), default=0)
            if not size:
                continue
            staged = 0 if self._backend.unified else max(unit.disk.nbytes for unit in units)
            ring = [
                _Slot(
                    self._allocate(Tier.DEVICE, size, "working memory for streamed weights"),
                    self._allocate(Tier.HOST, staged, "staging for weights") if staged else None,
                )
                for _ in range(count)
            ]
            for number, unit in enumerate(units):
                unit.ring = ring if count == 1 else [ring[number % count]]

    def _allocate(self, tier: Tier, nbytes: int, what: str) -> torch.Tensor:
        home = self._backend.allocate(tier, nbytes, what)
        self._homes.append((tier, home))
        return home

    @property
    def streamed_bytes(self) -> int:
        """Bytes that cross a link to the device in every sweep."""
        return sum(unit.streamed_bytes for unit in self._units)

    def view(self, name: str) -> torch.Tensor | FileExtent:
        """Where weight `name` is at home: uint8 [nbytes] in memory, or an extent."""
        return self._views[name]

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Put the values of weight `name` in its home."""
        home = self._views[name]
        data = tensor.contiguous().view(-1).view(torch.uint8)
        if isinstance(home, FileExtent):
            home.file.write(home.offset, data)
        else:
            home.copy_(data)

    def prefetch(self, number: int) -> list[Transfer]:
        """Send the streamed weights of unit `number` on their way."""
        unit = self._units[number]
        if not unit.streamed_bytes:
            return []
        slot = unit.slot = unit.ring[0]
        split = unit.host.nbytes
        unit.transfers = []
        if unit.host_home is not None:
            unit.transfers.append(
                self._transfers.submit(
                    Link.HOST_TO_DEVICE,
                    unit.host_home,
                    slot.data[:split],
                    kind="weights",
                    after=[slot.free],
                )
            )
        if unit.disk_home is not None:
            target = slot.data[split : split + unit.disk.nbytes]
            unit.transfers.append(self._from_disk(unit.disk_home, target, slot))
        return unit.transfers

    def _from_disk(self, home: FileExtent, target: torch.Tensor, slot: _Slot) -> Transfer:
        submit = self._transfers.submit
        if slot.staging is None:
            return submit(Link.DISK_TO_DEVICE, home, target, kind="weights", after=[slot.free])
        staging = slot.staging[: home.nbytes]
        waits = [] if slot.last is None else [slot.last]
        read = submit(Link.DISK_TO_HOST, home, staging, kind="weights", after=waits)
        slot.last = submit(
            Link.HOST_TO_DEVICE, staging, target, kind="weights", after=[read, slot.free]
        )
        return slot.last

    def bind(self, number: int) -> None:
        """Make the weights of unit `number` the model's parameters, once they have arrived."""
        unit = self._units[number]
        if unit.slot is None:
            return
        for transfer in unit.transfers:
            transfer.wait()
        slot = unit.slot
        if number not in slot.bound:
            split, end = unit.host.nbytes, unit.streamed_bytes
            views = [
                *unit.host.views(slot.data[:split]),
                *unit.disk.views(slot.data[split:end]),
            ]
            slot.bound[number] = [
                (module, attribute, parameter)
                for weight, view in views
                for parameter in [weight.parameter(view)]
                for module, attribute in weight.users
            ]
        for module, attribute, parameter in slot.bound[number]:
            module._parameters[attribute] = parameter

    def release(self, number: int) -> None:
        """The compute submitted so far is the last that reads unit `number` in this sweep."""
        unit = self._units[number]
        if unit.slot is not None:
            unit.slot.free = self._backend.record()
            unit.slot = None

    def close(self) -> None:
        """Give all memory back."""
        for weight in self._weights:  # the model's parameters hold on to it, too
            weight.bind(torch.empty(weight.nbytes, dtype=torch.uint8, device="meta"))
        for tier, home in self._homes:
            self._backend.free(tier, home)
        self._homes.clear()
        self._views.clear()
        self._units.clear()
