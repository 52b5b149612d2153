"""Units of weights, and the working memory that their streamed bytes pass through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from offload.slabs import DiskSlab, Slab, Weight
    from offload.transfer import Transfer


@dataclass(slots=True)
class Slot:
    """Working memory for one unit's streamed bytes."""

    data: torch.Tensor
    free: Any = None
    """Event after which the bytes may be overwritten."""
    bound: dict[int, list[tuple[Weight, torch.nn.Parameter]]] = field(default_factory=dict)


@dataclass(slots=True)
class Unit:
    """What is bound together: its weights, and where they are."""

    stays: list[Weight]
    """At home where the device computes."""
    host: Slab
    disk: DiskSlab
    host_home: torch.Tensor | None = None
    ring: list[Slot] = field(default_factory=list)
    """The slots that this unit may use: shared by all layers, or the head's own."""
    slot: Slot | None = None
    """Where its bytes are, or are on their way to, in this sweep."""
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def streamed_bytes(self) -> int:
        return self.disk.nbytes + self.host.nbytes
