"""What a policy takes of every tier: a prediction of all the engine allocates (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.errors import CapacityError
from offload.placement import place
from offload.tiers import BUDGET_FLAG, CACHE_LINE, DISK_BLOCK, Tier, format_size
from offload.tiers import padded as round_up

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from offload.placement import TensorSpec
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy

LAZY_FILL = 0.9
"""Share of the room on a lazy tier that KV pages may take."""


@dataclass(frozen=True, slots=True)
class TierMemory:
    """Bytes of one tier, by what they are for."""

    weights: int
    kv: int
    working: int
    """Activations, room for streamed weights, staging, and what rounding adds."""
    capacity: int

    @property
    def free(self) -> int:
        """What is left."""
        return self.capacity - self.weights - self.kv - self.working


def workspace(shape: ModelShape, policy: Policy) -> int:
    """Bytes on DEVICE that a sweep under `policy` needs for activations."""
    return shape.workspace_bytes(
        policy.micro_batch_rows, policy.max_rows, policy.max_sequences, policy.gathered_tokens
    )


def memory_of(
    shape: ModelShape,
    policy: Policy,
    limits: Mapping[Tier, int],
    context_length: int,
    *,
    unified: bool,
) -> dict[Tier, TierMemory]:
    """Memory of every tier under `policy`. Raises `CapacityError` where it exceeds `limits`.

    `unified` says that HOST is the memory of the device, as on a CPU.
    """
    weights, working = _weights(shape, policy, unified)
    working[Tier.DEVICE] += workspace(shape, policy)
    free = {tier: limits[tier] - weights[tier] - working[tier] for tier in Tier}
    for tier in reversed(Tier):  # the last resort first: what is short there fits nowhere
        if free[tier] < 0:
            raise CapacityError(
                f"the model does not fit: {format_size(-free[tier])} are missing on {tier} for "
                f"{format_size(weights[tier])} of weights and {format_size(working[tier])} of "
                f"working memory ({BUDGET_FLAG[tier]} is {format_size(limits[tier])})",
                hint=_remedy(tier, unified, weights[tier]),
            )
    lazy = (Tier.DEVICE, Tier.HOST) if unified else ()
    room, staging = kv_room(shape, policy, free, context_length, unified=unified, lazy=lazy)
    pages = kv_pages(shape, policy, room, context_length)
    page_bytes = shape.kv_token_bytes * policy.page_tokens
    buffer = staging * max(shape.kv_bytes_per_token) * policy.page_tokens
    working[Tier.DEVICE] += 2 * buffer
    working[Tier.HOST] += 4 * buffer + _embedding_rows(shape, policy, unified)
    kv = {tier: pages.get(tier, 0) * page_bytes for tier in Tier}
    result = {t: TierMemory(weights[t], kv[t], working[t], limits[t]) for t in Tier}
    if result[Tier.HOST].free < 0:
        raise CapacityError(
            f"working memory does not fit on host: {format_size(-result[Tier.HOST].free)} are "
            f"missing for rows of the embedding table",
            hint=_remedy(Tier.HOST, unified, weights[Tier.HOST]),
        )
    return result


def _remedy(tier: Tier, unified: bool, weights: int) -> str:
    if tier is Tier.DISK:
        others = "--device-memory" if unified else "--device-memory or --host-memory"
        return f"raise --disk-space, or {others}"
    slower = "--disk-space" if tier is Tier.HOST or unified else "--host-memory"
    move = f", or {slower} to move weights there" if weights else ""
    return f"raise {BUDGET_FLAG[tier]}{move}, or lower --micro-batch and --max-rows"


def kv_room(
    shape: ModelShape,
    policy: Policy,
    free: Mapping[Tier, int],
    context_length: int,
    *,
    unified: bool,
    lazy: Collection[Tier] = (),
) -> tuple[dict[Tier, int], int]:
    """Bytes per tier that KV pages may take of `free`, and the pages of one staging buffer.

    Pages on a HOST that is not the device's memory pass through two buffers on the device, each
    with two on HOST. The buffers take at most half of what is free on the device. Pages on `lazy`
    tiers, whose memory is taken when it is first written, leave a part of it to other programs.
    """
    room = dict(free)
    room[Tier.HOST] -= _embedding_rows(shape, policy, unified)
    staging = 0
    if policy.kv_cache.host and not unified:
        layer_page_bytes = max(shape.kv_bytes_per_token) * policy.page_tokens
        whole_sequence = -(-context_length // policy.page_tokens)
        staging = max(1, min(whole_sequence, room[Tier.DEVICE] // 4 // layer_page_bytes))
        room[Tier.DEVICE] -= 2 * staging * layer_page_bytes
        room[Tier.HOST] -= 4 * staging * layer_page_bytes
    for tier in lazy:
        room[tier] = int(room[tier] * LAZY_FILL)
    return {tier: max(0, nbytes) for tier, nbytes in room.items()}, staging


def kv_pages(
    shape: ModelShape, policy: Policy, room: Mapping[Tier, int], context_length: int
) -> dict[Tier, int]:
    """Pages per tier that follow the policy's split and fit into `room` (bytes left per tier).

    Raises `CapacityError` where a tier that is to hold KV has not the room for one page.
    """
    page_bytes = shape.kv_token_bytes * policy.page_tokens
    used = [tier for tier in (Tier.DEVICE, Tier.HOST) if policy.kv_cache.fraction(tier)]
    total = float(policy.max_sequences * -(-context_length // policy.page_tokens))
    for tier in used:
        total = min(total, room[tier] // page_bytes / policy.kv_cache.fraction(tier))
    pages = {t: int(total * policy.kv_cache.fraction(t)) for t in (Tier.DEVICE, Tier.HOST)}
    for tier in used:
        # At least one, where rounding alone took it away.
        pages[tier] = max(pages[tier], min(1, room[tier] // page_bytes))
        if pages[tier] < 1:
            raise CapacityError(
                f"no room for the KV cache on {tier}: one page of {policy.page_tokens} tokens "
                f"needs {format_size(page_bytes)}, {format_size(max(0, room[tier]))} is left",
                hint="raise --device-memory or --host-memory, move the KV cache (--kv-cache) or "
                "weights (--weights) to another tier, or lower --micro-batch and --max-rows",
            )
    return pages


def _weights(
    shape: ModelShape, policy: Policy, unified: bool
) -> tuple[dict[Tier, int], dict[Tier, int]]:
    """Bytes of weights per tier, and what the weights need besides."""
    away = {Tier.DISK} if unified else {Tier.HOST, Tier.DISK}
    if not shape.tensors:
        homes = {t: int(shape.weight_bytes * policy.weights.fraction(t)) for t in Tier}
        ring = shape.working_bytes(policy.prefetch_depth)
        working = dict.fromkeys(Tier, 0)
        working[Tier.DEVICE] = ring if any(homes[tier] for tier in away) else 0
        working[Tier.HOST] = ring if homes[Tier.DISK] and not unified else 0
        return homes, working
    tiers = place(shape.tensors, policy.weights)
    homes = dict.fromkeys(Tier, 0)
    padded = dict.fromkeys(Tier, 0)
    for tensor in shape.tensors:
        homes[tiers[tensor.name]] += tensor.nbytes
        padded[tiers[tensor.name]] += round_up(tensor.nbytes, CACHE_LINE)
    homes[Tier.DEVICE] += shape.resident_bytes
    padded[Tier.DEVICE] += round_up(shape.resident_bytes, CACHE_LINE)
    if padded[Tier.DISK]:
        padded[Tier.DISK] += (shape.num_layers + 2) * DISK_BLOCK
    working = {tier: padded[tier] - homes[tier] for tier in Tier}
    depth = policy.prefetch_depth
    working[Tier.DEVICE] += _ring(shape, depth, (t for t in shape.tensors if tiers[t.name] in away))
    if not unified:
        on_disk = (t for t in shape.tensors if tiers[t.name] is Tier.DISK)
        working[Tier.HOST] += _ring(shape, depth, on_disk)
    return homes, working


def _ring(shape: ModelShape, depth: int, streamed: Iterable[TensorSpec]) -> int:
    """Slots for the largest layer's streamed weights, and one for the head's."""
    units = [0] * (shape.num_layers + 1)
    for tensor in streamed:
        if tensor.unit >= 0:  # rows of an embedding table are gathered, never streamed
            units[tensor.unit] += round_up(tensor.nbytes, CACHE_LINE)
    return depth * max(units[:-1]) + units[-1]


def _embedding_rows(shape: ModelShape, policy: Policy, unified: bool) -> int:
    """HOST staging for the rows of an embedding table that may not be on the device."""
    away = not unified and policy.weights.device < 100
    return policy.micro_batch_rows * shape.hidden_size * shape.value_bytes if away else 0
