"""What a policy takes of every tier: a prediction of all the engine allocates (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload.errors import CapacityError
from offload.tiers import (
    BROKEN_OFF,
    BUDGET_FLAG,
    CACHE_LINE,
    REQUEST_BYTES,
    STAGING_BUFFERS,
    Tier,
    format_size,
    staging_buffer_bytes,
)
from offload.tiers import padded as round_up
from policy_search.kv_memory import (
    batch_flags,
    embedding_rows,
    hosted_rows,
    kv_file_bytes,
    kv_pages,
    kv_room,
    kv_working,
    recent_pages_bytes,
    swap_pages,
)
from policy_search.placed_weights import placed_weights
from policy_search.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from policy_search.model_shape import ModelShape

SHARE_OF_ROWS, MOST_DEFAULT_ROWS = 0.02, 8192
SHARE_OF_PAGES = 0.125
"""Of DEVICE, for the first and the newest page of all sequences where other pages are packed."""
IN_MOTION = 4
"""Micro-batches whose activations are on DEVICE although they live on HOST: the one that computes,
the next one, or one that has broken off, and two on their way out."""


@dataclass(frozen=True, slots=True)
class TierMemory:
    """Bytes of one tier, by what they are for."""

    weights: int
    kv: int
    working: int
    """Activations, room for streamed weights, staging, and what rounding adds."""
    capacity: int
    elsewhere: int = 0
    """Of the weights: in the model's own files, so that they take nothing of the capacity."""
    kv_of_one: int | None = None
    """Of `kv`: most that one sequence may have here, where pages pass through staging."""

    @property
    def free(self) -> int:
        """What is left."""
        return self.capacity - (self.weights - self.elsewhere) - self.kv - self.working


def workspace(shape: ModelShape, policy: Policy) -> int:
    """Bytes on DEVICE that a sweep under `policy` needs for activations.

    What waits on HOST is on DEVICE, too, while its micro-batch computes or is about to.
    """
    everything = shape.workspace_bytes(
        policy.micro_batch_rows, policy.max_rows, policy.logit_rows, policy.gathered_tokens
    )
    more = BROKEN_OFF - 1 if hosted_rows(policy, unified=False) else 0
    moving = (IN_MOTION + more) * policy.micro_batch_rows
    away = max(0, int(policy.max_rows * policy.activations.fraction(Tier.HOST)) - moving)
    return everything - away * shape.hidden_size * shape.value_bytes


def default_max_rows(shape: ModelShape, device_bytes: int) -> int:
    """Rows of a sweep that take `SHARE_OF_ROWS` of DEVICE while they wait, within bounds.

    A fast device computes thousands while a sweep's weights arrive.
    """
    row_bytes = 3 * shape.hidden_size * shape.value_bytes  # as `ModelShape.workspace_bytes` counts
    least = Policy().max_rows
    return min(MOST_DEFAULT_ROWS, max(least, int(SHARE_OF_ROWS * device_bytes) // row_bytes))


def default_max_sequences(shape: ModelShape, device_bytes: int) -> int:
    """Sequences whose pages that are not packed take `SHARE_OF_PAGES` of DEVICE, at most."""
    most = Policy().max_sequences
    each = recent_pages_bytes(shape, replace(Policy(), max_sequences=1))
    return most if not each else max(1, min(most, int(SHARE_OF_PAGES * device_bytes) // each))


def parked_rows(policy: Policy) -> int:
    """Rows whose hidden states HOST has room for; none if all of them stay on DEVICE."""
    share = policy.activations.fraction(Tier.HOST)
    if not share:
        return 0
    return min(policy.max_rows, int(policy.max_rows * share) + policy.micro_batch_rows)


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
    if not unified:
        working[Tier.HOST] += parked_rows(policy) * shape.hidden_size * shape.value_bytes
    elsewhere = dict.fromkeys(Tier, 0)
    if weights[Tier.DISK] and not shape.prepared_bytes:
        elsewhere[Tier.DISK] = weights[Tier.DISK]
    free = {t: limits[t] - (weights[t] - elsewhere[t]) - working[t] for t in Tier}
    for tier in reversed(Tier):  # the last resort first: what is short there fits nowhere
        if free[tier] < 0:
            raise CapacityError(
                f"the model does not fit: {format_size(-free[tier])} are missing on {tier} for "
                f"{format_size(weights[tier])} of weights and {format_size(working[tier])} of "
                f"{_other_memory(shape, tier)} "
                f"({BUDGET_FLAG[tier]} is {format_size(limits[tier])})",
                hint=_remedy(shape, tier, unified, weights[tier]),
            )
    lazy = (Tier.DEVICE, Tier.HOST) if unified else ()
    room, staging = kv_room(shape, policy, free, context_length, unified=unified, lazy=lazy)
    pages = kv_pages(shape, policy, room, context_length)
    page_bytes = shape.kv_token_bytes * policy.page_tokens
    for tier, nbytes in kv_working(shape, policy, staging, unified).items():
        working[tier] += nbytes
    working[Tier.HOST] += embedding_rows(shape, policy, unified)
    kv = {tier: pages.get(tier, 0) * page_bytes for tier in Tier}
    working[Tier.DISK] += kv_file_bytes(shape, policy, pages[Tier.DISK]) - kv[Tier.DISK]
    swap, count = swap_pages(shape, policy, pages, room, context_length, unified=unified)
    if swap is not None:
        on_disk = kv_file_bytes(shape, policy, count)
        working[swap] += on_disk if swap is Tier.DISK else count * page_bytes
    away = (Tier.DISK,) if unified else (Tier.HOST, Tier.DISK)
    of_one = {tier: min(kv[tier], staging * page_bytes) for tier in away if kv[tier]}
    result = {
        t: TierMemory(weights[t], kv[t], working[t], limits[t], elsewhere[t], of_one.get(t))
        for t in Tier
    }
    for tier in (Tier.HOST, Tier.DEVICE):
        if result[tier].free < 0:
            raise CapacityError(
                f"working memory does not fit on {tier}: {format_size(-result[tier].free)} are "
                f"missing for {_kv_memory(shape)} and rows of the embedding table",
                hint=_remedy(shape, tier, unified, weights[tier]),
            )
    return result


def longest_held(shape: ModelShape, policy: Policy, memory: Mapping[Tier, TierMemory]) -> int:
    """Tokens of the longest sequence that pages and staging have room for."""
    of_one = [used.kv if used.kv_of_one is None else used.kv_of_one for used in memory.values()]
    return sum(of_one) // (shape.kv_token_bytes * policy.page_tokens) * policy.page_tokens


def _other_memory(shape: ModelShape, tier: Tier) -> str:
    store = tier is Tier.DISK and shape.always_prepared
    return "the prepared store of quantized weights" if store else "working memory"


def _kv_memory(shape: ModelShape) -> str:
    newest = ", first and newest pages of all sequences" if shape.kv_packed else ""
    return f"staging of KV pages{newest}"


def _remedy(shape: ModelShape, tier: Tier, unified: bool, weights: int) -> str:
    if tier is Tier.DISK and shape.always_prepared:
        return "raise --disk-space, or choose a larger disk with --offload-dir"
    if tier is Tier.DISK:
        others = "--device-memory" if unified else "--device-memory or --host-memory"
        return f"raise --disk-space, or {others}"
    slower = "--disk-space" if tier is Tier.HOST or unified else "--host-memory"
    move = f", or {slower} to move weights there" if weights else ""
    return f"raise {BUDGET_FLAG[tier]}{move}, or lower {batch_flags(shape)}"


def _weights(
    shape: ModelShape, policy: Policy, unified: bool
) -> tuple[dict[Tier, int], dict[Tier, int]]:
    """Bytes of weights per tier, and what the weights need besides.

    A prepared store on DISK holds all weights, whatever the split.
    """
    away = {Tier.DISK} if unified else {Tier.HOST, Tier.DISK}
    working = dict.fromkeys(Tier, 0)
    working[Tier.DEVICE] = shape.expanded_bytes
    if not shape.tensors:
        homes = {t: int(shape.weight_bytes * policy.weights.fraction(t)) for t in Tier}
        ring = shape.working_bytes(policy.depth)
        working[Tier.DEVICE] += ring if any(homes[tier] for tier in away) else 0
        if (homes[Tier.DISK] or policy.kv_cache.disk) and not unified:
            working[Tier.HOST] = STAGING_BUFFERS * REQUEST_BYTES
        working[Tier.DISK] = _store_overhead(shape, homes)
        return homes, working
    placed = placed_weights(shape, policy.weights, unified=unified)
    homes = dict(placed.homes)
    for tier, nbytes in placed.padding.items():
        working[tier] += nbytes
    homes[Tier.DEVICE] += shape.resident_bytes
    working[Tier.DEVICE] += round_up(shape.resident_bytes, CACHE_LINE) - shape.resident_bytes
    *layers, head = placed.streamed
    working[Tier.DEVICE] += policy.depth * max(layers) + head
    largest = max(smallest_relay(policy), *placed.slabs)
    if largest and not unified:
        working[Tier.HOST] += STAGING_BUFFERS * staging_buffer_bytes(largest)
    working[Tier.DISK] = _store_overhead(shape, homes)
    return homes, working


def smallest_relay(policy: Policy) -> int:
    """Bytes that a buffer between disk and a separate device has at least, for KV pages."""
    return REQUEST_BYTES if policy.kv_cache.disk else 0


def _store_overhead(shape: ModelShape, homes: Mapping[Tier, int]) -> int:
    """What a prepared store has besides the weights that are read from it."""
    written = shape.prepared_bytes if homes[Tier.DISK] or shape.always_prepared else 0
    return max(0, written - homes[Tier.DISK])
