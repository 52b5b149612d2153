"""How long a sweep takes: the busiest resource's time, as all of them work at once (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from policy_search.operators import compute_seconds, expansion_seconds

if TYPE_CHECKING:
    from policy_search.hardware import Hardware
    from policy_search.model_shape import ModelShape

WORTH_SPLITTING = 0.15
"""Of a sweep's time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepWork:
    """What a sweep has to do."""

    weights: int
    """Bytes of weights that cross the link to the device."""
    host_kv: int
    """Bytes of keys and values on HOST that running sequences attend to."""
    compute: float = 0.0
    """Seconds of everything else on the device, in all layers."""
    around: float = 0.0
    """Seconds of the device before the first layer and after the last one: nobody attends then."""
    program: float = 0.0
    """Seconds in which the device waits for the program, besides."""
    stages: float = math.inf
    """Layers times micro-batches: the equal parts that the work consists of."""


def busy_seconds(work: SweepWork, hardware: Hardware, host_share: float) -> dict[str, float]:
    """Seconds in which each resource is busy if HOST attends to `host_share` of its pages."""
    moved = work.weights + (1 - host_share) * work.host_kv
    return {
        "host->device": moved / hardware.host_to_device,
        "host attention": host_share * work.host_kv / hardware.host_attention,
        "compute": work.compute + work.around,
    }


def sweep_seconds(work: SweepWork, hardware: Hardware, host_share: float) -> float:
    """Of a sweep in which a resource is busy whenever it has something to do.

    What is the bound waits for the others' parts of the first stage before it begins, and they go
    on with those of the last one when it has ended: a pipeline's filling and draining.
    """
    busy = busy_seconds(work, hardware, host_share)
    shorter, longer = sorted((busy["host attention"], work.compute))
    pages = (1 - host_share) * work.host_kv / hardware.host_to_device
    # Weights travel all the time, pages only while there are layers to attend in.
    link = max(busy["host->device"], pages + work.around if pages else 0.0)
    device = device_seconds(work, hardware, host_share)
    others = shorter + longer if link > device else shorter + link
    return max(beside(link, device, hardware)) + others / work.stages


def device_seconds(work: SweepWork, hardware: Hardware, host_share: float) -> float:
    """Until device and processor are through, if they never wait for bytes."""
    attending = busy_seconds(work, hardware, host_share)["host attention"]
    shorter, longer = sorted((attending, work.compute))
    # While both work, each does 1 - contention of a second's work in a second.
    both = longer + shorter * hardware.contention / (1 - hardware.contention)
    return both + work.around + work.program


def beside(link: float, device: float, hardware: Hardware) -> tuple[float, float]:
    """How long both take at the same time, of what takes `link` and `device` seconds alone.

    The one that ends first is slowed down by the other all the time, which is slowed down by it
    as long. Neither takes longer than both one after the other.
    """
    lost, loses = hardware.compute_lost, hardware.link_lost
    slow_link, slow_device = link / (1 - loses), device / (1 - lost)
    if slow_link <= slow_device:
        slow_device = device + lost * slow_link
    else:
        slow_link = link + loses * slow_device
    return min(slow_link, link + device), min(slow_device, link + device)


def best_host_share(work: SweepWork, hardware: Hardware) -> float:
    """The share of its pages that HOST should attend to: all, none, or link and processor as long.

    The last comes from (weights + (1 - s) kv) / link = s kv / attention. It has the overheads of
    both ways, so it has to save more than `WORTH_SPLITTING` of the better one.
    """
    if not work.host_kv:
        return 0.0
    moved = (work.weights + work.host_kv) / hardware.host_to_device
    per_share = work.host_kv / hardware.host_to_device + work.host_kv / hardware.host_attention
    balanced = min(1.0, moved / per_share)
    seconds = {share: sweep_seconds(work, hardware, share) for share in (1.0, 0.0, balanced)}
    best = 1.0 if seconds[1.0] <= seconds[0.0] else 0.0
    return balanced if seconds[balanced] < (1 - WORTH_SPLITTING) * seconds[best] else best


def weight_seconds(streamed: int, from_disk: int, hardware: Hardware) -> float:
    """Until the weights of a sweep have arrived: bytes that cross the link to the device, and those
    of them that come from disk.
    """
    return max(streamed / hardware.host_to_device, from_disk / hardware.disk_read)


def swapping_is_cheaper(shape: ModelShape, hardware: Hardware, tokens: int) -> bool:
    """Whether `tokens` positions move to another tier and back in less time than they compute.

    vLLM's question (SOSP 2023, section 4.5), with the link's speed instead of a rule.
    """
    moved = 2 * tokens * shape.kv_token_bytes / hardware.swap
    return moved < compute_seconds(shape, hardware, tokens, tokens * tokens // 2)


def free_rows(shape: ModelShape, hardware: Hardware, seconds: float) -> float:
    """Rows that compute in the `seconds` that a sweep's weights need to arrive: they cost nothing.

    Sarathi's token budget with the roles changed: there prefill is what a decode batch has room for
    beside its reads of the weights, here beside their way to the device. Expanding the weights
    takes a part of that time.
    """
    left = max(0.0, seconds - expansion_seconds(shape, hardware))
    return left * hardware.flops / shape.flops_per_row
