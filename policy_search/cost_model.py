"""How long a sweep takes: the busiest resource's time, as all of them work at once (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from policy_search.hardware import Hardware


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepWork:
    """What a sweep has to do."""

    weights: int
    """Bytes of weights that cross the link to the device."""
    host_kv: int
    """Bytes of keys and values on HOST that running sequences attend to."""
    compute: float = 0.0
    """Seconds of everything else on the device."""


def busy_seconds(work: SweepWork, hardware: Hardware, host_share: float) -> dict[str, float]:
    """Seconds in which each resource is busy if HOST attends to `host_share` of its pages."""
    moved = work.weights + (1 - host_share) * work.host_kv
    return {
        "host->device": moved / hardware.host_to_device,
        "host attention": host_share * work.host_kv / hardware.host_attention,
        "compute": work.compute,
    }


def sweep_seconds(work: SweepWork, hardware: Hardware, host_share: float) -> float:
    """Of a sweep in which every resource is always busy that has something to do."""
    return max(busy_seconds(work, hardware, host_share).values())


def best_host_share(work: SweepWork, hardware: Hardware) -> float:
    """The share of its pages that HOST should attend to: link and processor take as long.

    From (weights + (1 - s) kv) / link = s kv / attention; all of it where the link has enough to do
    with weights alone.
    """
    if not work.host_kv:
        return 0.0
    moved = (work.weights + work.host_kv) / hardware.host_to_device
    per_share = work.host_kv / hardware.host_to_device + work.host_kv / hardware.host_attention
    return min(1.0, moved / per_share)
