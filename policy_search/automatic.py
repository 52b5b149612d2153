"""The automatic policy: fill the fastest tier first, and leave room for KV and working memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload.errors import CapacityError
from offload.tiers import STAGING_BUFFERS, Split, Tier, format_size, staging_buffer_bytes
from policy_search.kv_memory import LAZY_FILL, batch_flags, packed_working
from policy_search.memory import memory_of, workspace
from policy_search.policy import DEFAULT_DEPTH

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy

SMALLEST_DEPTH = 2
"""Of prefetching: a layer that computes and one on its way."""
WORTH_A_SLOT = 0.75
"""Share of the KV cache that has to remain for a third layer slot."""
KV_SHARE = 0.5
"""Most of a tier's memory, beside working memory, that KV cache is given before weights are."""
ENOUGH_KV = 0.125
"""KV cache of this share of the DEVICE memory is enough to keep all weights there."""
_MARGINS = (0.0, 0.01, 0.05, 0.2)
"""Shares of a tier left empty, tried in turn: whole tensors can miss their share of the bytes."""


def automatic_policy(
    shape: ModelShape,
    limits: Mapping[Tier, int],
    base: Policy,
    context_length: int,
    *,
    unified: bool,
    kv_cache: Split | None = None,
) -> Policy:
    """`base` with weights and KV cache placed under `limits` (bytes per tier).

    Everything stays on DEVICE if the weights leave enough of it for KV. Otherwise weights fill
    DEVICE, then HOST, then DISK, beside a KV cache on DEVICE; one that is too small there for a
    single sequence of `context_length` goes to HOST, if that has more room. `unified` says that
    HOST is the memory of the device: then only DEVICE and DISK are used. Where `kv_cache` is given,
    only weights are placed. The plan is held against `memory_of`, which knows the engine's
    allocations. Raises `CapacityError` if nothing fits.
    """
    if base.prefetch_depth is None:
        try:
            policy = replace(base, prefetch_depth=DEFAULT_DEPTH)
            return automatic_policy(
                shape, limits, policy, context_length, unified=unified, kv_cache=kv_cache
            )
        except CapacityError:
            base = replace(base, prefetch_depth=SMALLEST_DEPTH)
    planner = _Planner(shape, limits, base, context_length, unified, kv_cache)
    room = planner.room[Tier.DEVICE]
    everything = replace(base, weights=Split(device=100), kv_cache=kv_cache or Split(device=100))
    enough = min(planner.wanted, ENOUGH_KV * (limits[Tier.DEVICE] - workspace(shape, base)))
    if planner.fits(everything, enough) is None:
        return everything
    shortage: CapacityError | None = None
    for policy, kv_bytes, last_resort in planner.candidates() if room >= 0 else ():
        error = planner.fits(policy, kv_bytes)
        if error is None:
            return policy
        if last_resort and shortage is None:
            shortage = error
    # The device may be too small for the buffers of streamed weights, but not for the weights.
    if planner.fits(everything, 0) is None:
        return everything
    raise shortage or CapacityError(
        f"working memory does not fit on device: {format_size(-room)} is missing",
        hint=f"raise --device-memory, or lower {batch_flags(shape)}",
    )


def with_depth(
    shape: ModelShape,
    policy: Policy,
    limits: Mapping[Tier, int],
    context_length: int,
    *,
    unified: bool,
) -> Policy:
    """`policy` with the prefetch depth that the memory allows, unless it has one.

    A layer more on its way is not worth a KV cache that is much smaller.
    """
    if policy.prefetch_depth is not None:
        return policy
    plans = [replace(policy, prefetch_depth=n) for n in (DEFAULT_DEPTH, SMALLEST_DEPTH)]
    rooms = []
    for plan in plans:
        try:
            memory = memory_of(shape, plan, limits, context_length, unified=unified)
            rooms.append(sum(tier.kv for tier in memory.values()))
        except CapacityError:
            rooms.append(0)
    return plans[0] if rooms[0] and rooms[0] >= WORTH_A_SLOT * rooms[1] else plans[1]


@dataclass(slots=True)
class _Planner:
    """Policies to try, the best first."""

    shape: ModelShape
    limits: Mapping[Tier, int]
    base: Policy
    context_length: int
    unified: bool
    given_kv: Split | None = None

    @property
    def room(self) -> dict[Tier, int]:
        """Bytes for weights and KV cache when weights are streamed; less than 0: what is missing.

        The buffers of weights from disk are not counted on HOST.
        """
        ring = self.shape.working_bytes(self.base.depth) + self.shape.expanded_bytes
        fixed = workspace(self.shape, self.base) + ring + self.shape.resident_bytes
        fixed += packed_working(self.shape, self.base, unified=self.unified)
        rows = self.base.max_rows * self.shape.hidden_size * self.shape.value_bytes
        host = 0 if self.unified else max(0, self.limits[Tier.HOST] - rows)
        disk = self.limits[Tier.DISK]
        return {Tier.DEVICE: self.limits[Tier.DEVICE] - fixed, Tier.HOST: host, Tier.DISK: disk}

    @property
    def one_sequence(self) -> int:
        """KV bytes of a sequence of the whole context length."""
        pages = -(-self.context_length // self.base.page_tokens)
        return pages * self.base.page_tokens * self.shape.kv_token_bytes

    @property
    def wanted(self) -> int:
        """KV bytes that suffice for everything."""
        return self.base.max_sequences * self.one_sequence

    def fits(self, policy: Policy, kv_bytes: float) -> CapacityError | None:
        """None if `policy` fits with at least about `kv_bytes` of KV cache, or what is short."""
        arguments = (self.shape, policy, self.limits, self.context_length)
        try:
            memory = memory_of(*arguments, unified=self.unified)
        except CapacityError as error:
            return error
        if sum(tier.kv for tier in memory.values()) >= kv_bytes:
            return None
        return CapacityError("the KV cache is smaller than planned")

    def candidates(self) -> Iterator[tuple[Policy, float, bool]]:
        """Each with the KV bytes that make it worth having, and whether nothing takes less memory.

        Less KV is tried where more leaves too little for the weights.
        """
        for share in self._kv_shares():
            for tier in self._kv_tiers():
                for margin in _MARGINS:
                    policy, kv_bytes = self._offloaded(tier, share, margin)
                    yield policy, kv_bytes, share == margin == 0

    def _kv_shares(self) -> list[float]:
        """The more weights are streamed, the more KV (a larger batch) it takes to pay for it."""
        room = max(1, self.room[Tier.DEVICE])
        excess = 2 * (self.shape.weight_bytes - room) / room
        first = min(KV_SHARE, max(ENOUGH_KV, excess))
        return [first, *(share for share in (ENOUGH_KV, 0.03, 0.0) if share < first)]

    def _kv_tiers(self) -> list[Tier]:
        if self.given_kv is not None:
            return [max(Tier, key=self.given_kv.fraction)]
        if self.unified or not self.room[Tier.HOST]:
            return [Tier.DEVICE]
        small = self.one_sequence > self.room[Tier.DEVICE] * KV_SHARE
        on_host = small and self.room[Tier.HOST] > self.room[Tier.DEVICE]
        return [Tier.HOST, Tier.DEVICE] if on_host else [Tier.DEVICE, Tier.HOST]

    def _offloaded(self, kv_tier: Tier, share: float, margin: float) -> tuple[Policy, float]:
        """Weights beside a KV cache on `kv_tier` that gets `share` of the room."""
        room = {tier: nbytes * (1 - margin) for tier, nbytes in self.room.items()}
        kv = min(self.wanted, room[kv_tier] * share)
        one_page = self.base.page_tokens * self.shape.kv_token_bytes
        room[kv_tier] -= max(kv, one_page / LAZY_FILL + 1)
        if kv_tier is not Tier.DEVICE:
            staged = self._staged(share)
            # The engine's staging takes half of what it finds beside pages, all where none live.
            beside_pages = self.given_kv is not None and self.given_kv.device > 0
            room[Tier.DEVICE] -= (2 if beside_pages else 1) * staged
            room[Tier.HOST] -= 2 * staged
        policy = replace(
            self.base,
            weights=self._weights(room),
            kv_cache=self.given_kv or Split(**{kv_tier.value: 100}),
        )
        return policy, kv / 2

    def _staged(self, share: float) -> float:
        """Bytes on DEVICE of the two staging buffers of KV pages."""
        largest_layer = max(self.shape.kv_bytes_per_token)
        whole = 2 * self.one_sequence * largest_layer / self.shape.kv_token_bytes
        one_page = 2 * self.base.page_tokens * largest_layer
        return max(one_page, min(whole, self.room[Tier.DEVICE] * share / 2))

    @property
    def _staging_buffer(self) -> int:
        return staging_buffer_bytes(max(self.shape.largest_layer_bytes, self.shape.head_bytes))

    def _weights(self, room: Mapping[Tier, float]) -> Split:
        placeable = self.shape.weight_bytes - self.shape.resident_bytes
        device = _percent(room[Tier.DEVICE], placeable)
        rest = round(100 - device, 2)
        if placeable * rest / 100 <= room[Tier.HOST]:
            return Split(device=device, host=rest)
        buffers = 0 if self.unified else STAGING_BUFFERS * self._staging_buffer
        host = min(rest, _percent(room[Tier.HOST] - buffers, placeable))
        return Split(device=device, host=host, disk=round(rest - host, 2))


def _percent(nbytes: float, total: int) -> float:
    """Rounded down to what people like to read."""
    return math.floor(min(1.0, max(0.0, nbytes / total)) * 10_000) / 100
