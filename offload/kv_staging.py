"""KV pages that attention does not read where they are: their way through staging on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offload.paged_kv import PagedKV, page_elements
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from offload.backend import DeviceBackend
    from offload.kv_layout import KVGroup
    from offload.paged_kv import LayerShape
    from offload.transfer import Transfer
    from offload.transfer_engine import TransferEngine

TURNS = 2
"""Micro-batches with pages in staging: the one that computes, and the next."""


@dataclass(slots=True)
class Staging:
    """Device copies of the pages of one micro-batch at a time."""

    device: torch.Tensor
    pools: dict[tuple[int, int, int], PagedKV] = field(default_factory=dict)
    """`device` as pages of each shape of layer."""
    free: Any = None
    """Event after which the copies may be overwritten, as far as compute is concerned."""
    leaving: list[Transfer] = field(default_factory=list)
    """Copies that still read `device`."""


class StagedPages(ABC):
    """The pages of one tier and how they come to the device and back.

    `turn` is one of the `TURNS` stagings; `after` are the transfers that store this layer's rows of
    earlier sweeps.
    """

    tier: Tier

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        page_tokens: int,
        pages: int,
        allocate: Callable[[Tier, int, str], torch.Tensor],
        backend: DeviceBackend,
        transfers: TransferEngine,
    ) -> None:
        """`pages` fit into one staging; `allocate(tier, elements, what)` gives memory."""
        self._allocate = allocate
        self._shapes = shapes
        self._page_tokens = page_tokens
        self._backend = backend
        self._transfers = transfers
        self._elements = pages * max(page_elements(shape, page_tokens) for shape in shapes)
        what = "staging for KV pages"
        self.stagings = [Staging(allocate(Tier.DEVICE, self._elements, what)) for _ in range(TURNS)]

    def pool(self, layer: int, turn: int) -> PagedKV:
        """What attention reads: staging as pages of a layer."""
        shape, staging = self._shapes[layer], self.stagings[turn]
        sizes = (shape.kv_heads, shape.key_dim, shape.value_dim)
        if sizes not in staging.pools:
            staging.pools[sizes] = PagedKV.of(staging.device, shape, self._page_tokens)
        return staging.pools[sizes]

    @abstractmethod
    def fetch(
        self, layer: int, turn: int, group: KVGroup, after: Sequence[Transfer]
    ) -> list[Transfer]:
        """Send the pages with content on their way to staging."""

    def arrive(self, layer: int, turn: int, group: KVGroup) -> None:
        """What was fetched is there: make the fresh pages ready."""
        for transfer in self.stagings[turn].leaving:
            transfer.wait()
        # Fresh pages are read whole, with weight zero where no token is: no old NaN there.
        self.pool(layer, turn).raw[group.num_filled : group.num_staged].zero_()

    @abstractmethod
    def keep(
        self,
        layer: int,
        turn: int,
        group: KVGroup,
        keys: torch.Tensor,
        values: torch.Tensor,
        after: Sequence[Transfer],
    ) -> list[Transfer]:
        """Send new `keys` [rows, kv_heads, key_dim] and `values`, now in staging, to the tier."""

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

    def _before_fetch(self, turn: int, after: Sequence[Transfer]) -> list[Any]:
        staging = self.stagings[turn]
        return [staging.free, *staging.leaving, *after]

    def close(self) -> None:
        """Let go of all memory and files."""
        self.stagings.clear()
