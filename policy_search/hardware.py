"""What a machine can do, in bytes and operations per second: measured, or stated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from policy_search.model_profile import ModelProfile

PACKED_ATTENTION = 0.45
"""Bytes per second at which the processor attends to packed pages, over those of plain ones, where
it is not measured: it is bound by compute there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Speeds that the cost model asks for; what is infinite has no limit."""

    host_to_device: float
    """Of copies from pinned RAM to the device."""
    device_to_host: float = math.inf
    links_together: float = math.inf
    """Bytes per second of all links in sum, while all of them work: they meet in RAM."""
    host_attention: float = math.inf
    """Bytes of keys and values in RAM that the processor attends to, a row for each sequence."""
    hosted_call: float = 0.0
    """Seconds until rows are back that the processor attends to, in one layer, besides."""
    contention: float = 0.0
    """Part of their speed that this attention and the device's compute lose while both work: where
    the device is emulated they share memory and caches."""
    compute_lost: float = 0.0
    """Part of its speed that compute loses while weights arrive, …"""
    link_lost: float = 0.0
    """… and their link while the device computes: both want memory, sometimes the same cores."""
    disk_read: float = math.inf
    """Bytes of weights that arrive from disk."""
    disk_write: float = math.inf
    """Bytes of KV pages that are written to it."""
    swap: float = math.inf
    """Of KV pages, one by one, on their way to the tier of sequences that wait."""
    expansion: float = math.inf
    """Bytes of weights as they are computed with, from those that are stored in another way."""
    matrix_read: float = math.inf
    """Bytes of matrices in products of few rows, which take as long as the device reads them."""
    device_attention: float = math.inf
    """Bytes of keys and values in the device's memory that it attends to, a row for each
    sequence."""
    flops: float = math.inf
    """Of matrix products on the device, with rows enough to be limited by compute."""
    attention_flops: float = math.inf
    """Of attention on the device with many rows of each sequence, in the computation of prompts."""
    products: tuple[tuple[int, float], ...] = ()
    """Rows, rising, and the operations per second of a product of so many with a matrix that is
    larger than caches; empty: as `flops` and `matrix_read` say."""
    profile: ModelProfile | None = None
    """What a model was measured to take; then this is hardware for that model alone."""

    def profiled(self, profile: ModelProfile) -> Hardware:
        """For the model of `profile`."""
        names = "device_attention", "attention_flops", "compute_lost", "link_lost"
        found = {name: getattr(profile, name) for name in names}
        known = {name: value for name, value in found.items() if value < math.inf}
        return replace(self, profile=profile, **known)


_FIELDS = {
    "disk->host": ("disk_read",),
    "disk->device": ("disk_read",),
    "host->device": ("host_to_device",),
    "device->host": ("device_to_host",),
    "host->disk": ("disk_write",),
    "host attention": ("host_attention",),
    "compute": ("expansion", "matrix_read", "device_attention", "flops", "attention_flops"),
}
"""Speeds that the seconds of a resource follow from."""


def with_factors(hardware: Hardware, factors: Mapping[str, float]) -> Hardware:
    """`hardware` on which what a resource does takes `factors` times as long."""
    changed: dict[str, Any] = {}
    for name, factor in factors.items():
        for field in _FIELDS.get(name, ()):
            changed[field] = getattr(hardware, field) / factor
    if compute := factors.get("compute"):
        changed["products"] = tuple((n, rate / compute) for n, rate in hardware.products)
        if hardware.profile is not None:
            changed["profile"] = hardware.profile.slowed(compute)
    return replace(hardware, **changed)
