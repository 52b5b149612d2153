"""The automatic policy: fill the fastest tier first, and leave room for the working memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offload.errors import CapacityError
from offload.tiers import Split, Tier, format_size
from policy_search.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from policy_search.model_shape import ModelShape

KV_SHARE = 0.5
"""Share of the DEVICE memory left beside working memory that the KV cache may take from weights."""


def automatic_policy(
    shape: ModelShape,
    limits: Mapping[Tier, int],
    base: Policy,
    context_length: int,
    *,
    unified: bool,
) -> Policy:
    """`base` with weights and KV cache placed under `limits` (bytes per tier).

    Everything stays on DEVICE if it fits. Otherwise the KV cache goes to HOST where that is a
    memory of its own, and weights fill DEVICE, then HOST, then DISK. Raises `CapacityError` if even
    that does not fit.
    """
    device = limits[Tier.DEVICE] - workspace(shape, base)
    kv_bytes = base.max_sequences * context_length * shape.kv_token_bytes
    smallest_kv = context_length * shape.kv_token_bytes
    if shape.weight_bytes + max(smallest_kv, min(kv_bytes, device * KV_SHARE)) <= device:
        return replace(base, weights=Split(device=100), kv_cache=Split(device=100))
    room = device - shape.working_bytes(base.prefetch_depth)
    if room < 0:
        raise CapacityError(
            f"working memory does not fit on device: {format_size(-room)} is missing",
            hint="raise --device-memory, or lower --micro-batch and --max-rows",
        )
    kv_on_device = unified or smallest_kv <= room * KV_SHARE
    on_device = max(0.0, room - (min(kv_bytes, room * KV_SHARE) if kv_on_device else 0))
    on_host = 0.0 if unified else limits[Tier.HOST] * (0.8 if kv_on_device else KV_SHARE)
    first = min(1.0, on_device / shape.weight_bytes)
    second = min(1.0 - first, on_host / shape.weight_bytes)
    device_percent, host_percent = int(first * 100), int(second * 100)
    rest = 100 - device_percent - host_percent
    if rest and first + second >= 0.999:
        host_percent, rest = host_percent + rest, 0  # rounding must not send a sliver to disk
    return replace(
        base,
        weights=Split(device=device_percent, host=host_percent, disk=rest),
        kv_cache=Split(device=100) if kv_on_device else Split(host=100),
    )


def workspace(shape: ModelShape, policy: Policy) -> int:
    """Bytes on DEVICE that a sweep under `policy` needs for activations."""
    return shape.workspace_bytes(policy.micro_batch_rows, policy.max_rows, policy.max_sequences)


def kv_pages(
    shape: ModelShape,
    policy: Policy,
    room: Mapping[Tier, int],
    context_length: int,
    host_overhead_pages: int = 0,
) -> dict[Tier, int]:
    """Pages per tier that follow the policy's split and fit into `room` (bytes left per tier).

    `host_overhead_pages` is what staging takes of HOST, in pages. Raises `CapacityError` when not
    even one sequence of one page fits.
    """
    page_bytes = shape.kv_token_bytes * policy.page_tokens
    per_sequence = -(-context_length // policy.page_tokens)
    total = float(policy.max_sequences * per_sequence)
    for tier in (Tier.DEVICE, Tier.HOST):
        fraction = policy.kv_cache.fraction(tier)
        if fraction:
            overhead = host_overhead_pages if tier is Tier.HOST else 0
            total = min(total, (room[tier] // page_bytes - overhead) / fraction)
    pages = {t: int(total * policy.kv_cache.fraction(t)) for t in (Tier.DEVICE, Tier.HOST)}
    for tier, count in pages.items():
        if policy.kv_cache.fraction(tier) and count < 1:
            raise CapacityError(
                f"no room for the KV cache on {tier}: one page of {policy.page_tokens} tokens "
                f"needs {format_size(page_bytes)}, {format_size(max(0, room[tier]))} is left",
                hint="raise --device-memory or --host-memory, move the KV cache (--kv-cache) or "
                "weights (--weights) to another tier, or lower --micro-batch and --max-rows",
            )
    return pages
