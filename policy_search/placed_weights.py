"""Where the weights of a model are under a split, and what moves of them (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from offload.disk_layout import DiskPlace, lay_out
from offload.placement import place
from offload.tiers import CACHE_LINE, DISK_BLOCK, Split, Tier, padded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload.placement import TensorSpec
    from policy_search.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class PlacedWeights:
    """Bytes of the weights that can be placed, as whole tensors."""

    homes: dict[Tier, int]
    """Of each tier."""
    padding: dict[Tier, int]
    """That rounding to cache lines adds."""
    used: dict[Tier, int]
    """Of `homes`, what each sweep computes with: an embedding table of its own gives rows only."""
    slabs: tuple[int, ...]
    """Of every layer and, last, of the head: read from disk in a sweep, in whole blocks."""
    streamed: tuple[int, ...]
    """The same, with what comes from a HOST that is not the device's memory."""
    in_place: float
    """The part of the layers' bytes that is computed with where it is stored, …"""
    head_in_place: float
    """… and of the head's."""
    gathers: bool
    """Whether an embedding table of its own is not where it is computed with."""


@lru_cache(maxsize=1024)  # a search asks for a split again with other batches
def placed_weights(shape: ModelShape, split: Split, *, unified: bool) -> PlacedWeights:
    """`unified` says that HOST is the memory of the device. The shape has tensors."""
    tiers = place(shape.tensors, split)
    here = (Tier.DEVICE, Tier.HOST) if unified else (Tier.DEVICE,)
    homes, padding, used, layers, head = (dict.fromkeys(Tier, 0) for _ in range(5))
    from_host = [0] * (shape.num_layers + 1)
    gathers = False
    for tensor in shape.tensors:
        tier, lines = tiers[tensor.name], padded(tensor.nbytes, CACHE_LINE)
        homes[tier] += tensor.nbytes
        padding[tier] += lines - tensor.nbytes
        if tensor.unit < 0:
            gathers = gathers or tier not in here
            continue
        used[tier] += tensor.nbytes
        (layers if tensor.unit < shape.num_layers else head)[tier] += tensor.nbytes
        if tier is Tier.HOST and not unified:
            from_host[tensor.unit] += lines
    slabs = [0] * len(from_host)
    if homes[Tier.DISK]:
        slabs = _disk_slabs(shape.by_unit(), tiers, unified)
    return PlacedWeights(
        homes=homes,
        padding=padding,
        used=used,
        slabs=tuple(slabs),
        streamed=tuple(slab + more for slab, more in zip(slabs, from_host)),
        in_place=sum(layers[tier] for tier in here) / (sum(layers.values()) or 1),
        head_in_place=sum(head[tier] for tier in here) / (sum(head.values()) or 1),
        gathers=gathers,
    )


def _disk_slabs(
    units: Sequence[Sequence[TensorSpec]], tiers: Mapping[str, Tier], unified: bool
) -> list[int]:
    slabs = []
    for unit in units:
        places, end = [], 0
        for tensor in unit:
            if tiers[tensor.name] is Tier.DISK:
                unknown = DiskPlace("", end, tensor.nbytes, DISK_BLOCK)
                places.append(tensor.disk or unknown)
                end += padded(tensor.nbytes, CACHE_LINE)
        slabs.append(lay_out(places, shifted=not unified).nbytes)
    return slabs
