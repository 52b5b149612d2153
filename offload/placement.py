"""Which tensor lives on which tier, so that the bytes match the split (no torch).

Whole tensors are placed; the error that leaves is carried to the next tensor, as in error
diffusion, so any split is met closely and every layer gets an even share. Large tensors are placed
first, because the small ones that follow can still make up for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.tiers import Split, Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload.disk_layout import DiskPlace


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor to place: its name, the unit of the forward pass it is used in, its bytes."""

    name: str
    unit: int
    nbytes: int
    disk: DiskPlace | None = None
    """Where it lies when it is on DISK; None: not known, as if next to its neighbours."""


def place(tensors: Sequence[TensorSpec], split: Split) -> dict[str, Tier]:
    """Tier of every tensor. The shares of the bytes follow `split` to within the smallest tensors.

    Each tensor goes to the tier that is furthest behind its share of the bytes placed so far. An
    oversized tensor (an embedding table can be a fifth of a small model) goes where the final share
    can hold it best.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    shares = [(tier, split.fraction(tier)) for tier in Tier if split.fraction(tier) > 0]
    if len(shares) == 1:
        return dict.fromkeys((tensor.name for tensor in tensors), shares[0][0])
    placed = [0] * len(shares)
    result: dict[str, Tier] = {}
    seen = 0
    for tensor in sorted(tensors, key=lambda t: (-_size_class(t.nbytes), t.unit, t.name)):
        nbytes = tensor.nbytes
        seen += nbytes
        oversized = nbytes > total / 50
        reference = total if oversized else seen
        behind = [reference * share - there for (_, share), there in zip(shares, placed)]
        chosen = behind.index(max(behind))
        placed[chosen] += nbytes
        result[tensor.name] = shares[chosen][0]
    return result


def _size_class(nbytes: int) -> int:
    """Tensors within a factor of two are of one class, so that layer order decides among them."""
    return nbytes.bit_length()


def bytes_per_tier(tensors: Sequence[TensorSpec], tiers: Mapping[str, Tier]) -> dict[Tier, int]:
    """Weight bytes on each tier."""
    result = dict.fromkeys(Tier, 0)
    for tensor in tensors:
        result[tiers[tensor.name]] += tensor.nbytes
    return result
