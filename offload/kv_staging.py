"""KV pages that attention does not read where they are: their way through staging on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from offload.links import Link, ScatteredRows, TensorRows
from offload.paged_kv import PagedKV
from offload.tiers import LEAVING_BATCHES, TURNS, Tier
from offload.transfer import URGENT

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from offload.kv_layout import KVGroup
    from offload.kv_memory import KVMemory
    from offload.transfer import Transfer
    from offload.transfer_engine import TransferEngine


class Visit(NamedTuple):
    """One layer of a micro-batch, whose pages pass through staging."""

    layer: int
    turn: int
    """Which of the `TURNS` stagings."""
    group: KVGroup
    after: Sequence[Transfer]
    """What stores this layer's rows of earlier sweeps."""


@dataclass(slots=True)
class Staging:
    """Device copies of the pages of one micro-batch at a time."""

    device: torch.Tensor
    pinned_in: torch.Tensor | None = None
    """Where pages are gathered into one copy to a separate device, …"""
    pinned_out: torch.Tensor | None = None
    """… and where what comes from it arrives."""
    pools: dict[tuple[int, int, int], PagedKV] = field(default_factory=dict)
    """`device` as pages of each shape of layer."""
    free: Any = None
    """Event after which the copies may be overwritten, as far as compute is concerned."""
    leaving: list[Transfer] = field(default_factory=list)
    """Copies that still read `device`."""
    kept: list[Transfer] = field(default_factory=list)
    """What still fills or reads `pinned_out`."""


class StagedPages(ABC):
    """The pages of one tier and how they come to the device and back."""

    tier: Tier

    def __init__(
        self,
        memory: KVMemory,
        pages: int,
        transfers: TransferEngine,
    ) -> None:
        """`pages` fit into one staging."""
        self._memory = memory
        self._backend = memory.backend
        self._transfers = transfers
        self._leaving: deque[Transfer] = deque()
        """Copies of new rows or pages, the earliest first, that may still read them on the device.
        """
        form, backend, allocate = memory.format, memory.backend, memory.allocate
        cells = pages * max(form.page(shape, memory.page_tokens) for shape in memory.shapes)
        what = "staging for KV pages"
        self.stagings = [
            Staging(allocate(Tier.DEVICE, form.cells, cells, what)) for _ in range(TURNS)
        ]
        for staging in () if backend.unified else self.stagings:
            staging.pinned_in = allocate(Tier.HOST, form.cells, cells, what)
            staging.pinned_out = allocate(Tier.HOST, form.cells, cells, what)

    def pool(self, layer: int, turn: int) -> PagedKV:
        """What attention reads: staging as pages of a layer."""
        memory, staging = self._memory, self.stagings[turn]
        shape = memory.shapes[layer]
        sizes = (shape.kv_heads, shape.key_dim, shape.value_dim)
        if sizes not in staging.pools:
            staging.pools[sizes] = PagedKV.of(
                staging.device, shape, memory.page_tokens, memory.format
            )
        return staging.pools[sizes]

    @abstractmethod
    def fetch(self, visit: Visit) -> list[Transfer]:
        """Send the pages with content on their way to staging."""

    def arrive(self, visit: Visit) -> None:
        """What was fetched is there: make the fresh pages ready."""
        for transfer in self.stagings[visit.turn].leaving:
            transfer.wait()
        group = visit.group
        if group.num_staged > group.num_filled:
            # They are read whole, with weight zero where no token is: no old NaN there.
            self.pool(visit.layer, visit.turn).raw[group.num_filled : group.num_staged].zero_()

    @abstractmethod
    def keep(self, visit: Visit, packed: torch.Tensor) -> list[Transfer]:
        """Send new keys and values, `packed` and already in staging, to the tier."""

    @abstractmethod
    def keep_pages(
        self, visit: Visit, packed: torch.Tensor, numbers: torch.Tensor
    ) -> list[Transfer]:
        """Send full pages [n, bytes] to `numbers` [n] of the tier; they are not in staging."""

    def _make_way(self) -> None:
        """Before more leaves the device, let the earliest be gone: all layers' would pile up."""
        while len(self._leaving) >= LEAVING_BATCHES:
            self._leaving.popleft().wait()

    def release(self, turn: int) -> None:
        """The compute submitted so far is the last that reads what is in staging."""
        self.stagings[turn].free = self._backend.record()

    def erase(self, pages: Sequence[int]) -> None:
        """Let no value in `pages`, which may be no numbers, be read by others: zero all staging.

        A tier whose pages are read before all of a page was written zeroes them as well.
        """
        for turn, staging in enumerate(self.stagings):
            for transfer in staging.leaving:
                transfer.wait()
            staging.device.zero_()
            self.release(turn)

    def _before_fetch(self, visit: Visit) -> list[Any]:
        staging = self.stagings[visit.turn]
        return [staging.free, *staging.leaving, *visit.after]

    def _gather(
        self, visit: Visit, table: torch.Tensor, rows: torch.Tensor, place: int
    ) -> Transfer:
        """Send `rows` of a layer's pages in RAM, as one copy, to staging from `place` on."""
        staging = self.stagings[visit.turn]
        return self._transfers.submit(
            Link.HOST_TO_DEVICE,
            TensorRows(table, rows, staging.pinned_in),
            self.pool(visit.layer, visit.turn).raw[place : place + rows.shape[0]],
            kind="kv",
            after=self._before_fetch(visit),
            priority=URGENT,
        )

    def _scatter(self, visit: Visit, source: torch.Tensor, target: ScatteredRows) -> Transfer:
        """Send what this layer has computed to RAM, through the turn's `pinned_out`."""
        staging = self.stagings[visit.turn]
        return self._transfers.submit(
            Link.DEVICE_TO_HOST,
            source,
            target,
            kind="kv",
            after=[self._backend.record(), *staging.kept, *visit.after],
        )

    def close(self) -> None:
        """Let go of all memory and files."""
        self.stagings.clear()
        self._leaving.clear()
