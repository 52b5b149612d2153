"""What a sweep takes under one policy: seconds of every resource, and of the sweep (no torch).

The terms of FlexGen's cost model (ICML 2023, section 4.3 and appendix A.3), with the sweep's time
as the largest of them instead of sums of some, pages that single rows attend to in RAM, prompts
that ride in the sweeps of sequences that generate, and keys and values shared by query heads.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING

from offload.tiers import REQUEST_BYTES, Tier
from policy_search.cost_model import (
    SweepWork,
    beside,
    best_host_share,
    busy_seconds,
    device_seconds,
    sweep_seconds,
)
from policy_search.kv_memory import hosted_row_bytes
from policy_search.operators import (
    attention_seconds,
    expansion_seconds,
    head_seconds,
    layer_seconds,
    program_seconds,
)
from policy_search.placed_weights import placed_weights
from policy_search.sweep_load import COMPUTE, HOST_ATTENTION, SweepLoad, SweepTerms

if TYPE_CHECKING:
    from collections.abc import Mapping

    from policy_search.hardware import Hardware
    from policy_search.memory import TierMemory
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy

UP, DOWN = "host->device", "device->host"
TO_DISK = "host->disk"
REQUESTS_BEFORE = 1.5
"""Of weights that urgent bytes wait for: half of the one under way, and the next one."""
PAGE_SECONDS = 1e-4
"""Of one layer's page on its way from disk, which is a read of its own, has a tail in RAM, and is
gathered: what runs of `scripts/bench_policy.py` took beyond its bytes, with pages of 32 KiB."""


class SweepCost:
    """Prices sweeps of one model, policy and machine."""

    def __init__(
        self,
        shape: ModelShape,
        policy: Policy,
        memory: Mapping[Tier, TierMemory],
        hardware: Hardware,
        *,
        unified: bool,
    ) -> None:
        """`memory` is what `policy` takes: it says how the pages are spread."""
        self.shape = shape
        self.policy = policy
        self.hardware = hardware
        self._unified = unified
        self._from_disk_link = "disk->device" if unified else "disk->host"
        self.streamed, self.from_disk = streamed_bytes(shape, policy, unified=unified)
        self._in_place, self._head_in_place = in_place(shape, policy, unified=unified)
        self._gathers = _gathers(shape, policy, unified=unified)
        total = sum(used.kv for used in memory.values()) or 1
        # All sequences have an equal share of their pages on each tier.
        self._kv = {tier: shape.kv_token_bytes * memory[tier].kv / total for tier in Tier}
        if unified:
            self._kv[Tier.HOST] = 0.0  # where they are computed with
        self._hosted = hosted_row_bytes(shape)
        self._page_seconds = disk_page_seconds(shape, policy)
        self._expansion = expansion_seconds(shape, hardware)
        row_bytes = shape.hidden_size * shape.value_bytes
        self._parked = policy.activations.fraction(Tier.HOST) * row_bytes * shape.num_layers
        """Bytes of a row's hidden states that leave and come back in a sweep."""

    def terms(self, load: SweepLoad) -> SweepTerms:
        """Of a sweep of `load`."""
        hardware, kv = self.hardware, self._kv
        pages = int(load.read * kv[Tier.HOST])
        work = self._work(load, pages, 0.0)
        share = self._host_share(work)
        batches = micro_batches(self.policy, load.rows)
        if share:
            work = self._work(load, pages, share)
        waiting = self._waiting(work, batches, share)
        work = replace(work, program=work.program + waiting)
        moved = self._moved(load, work, share)
        busy = busy_seconds(work, hardware, share) | {
            link: nbytes / speed for link, (nbytes, speed) in moved.items()
        }
        on_disk = (load.read + load.stored) * kv[Tier.DISK]
        busy[self._from_disk_link] += on_disk * self._page_seconds
        if not self.policy.overlap:
            return SweepTerms(sum(busy.values()) + work.program, busy)
        together = sum(nbytes for nbytes, _ in moved.values()) / hardware.links_together
        # What arrives and what computes may slow each other down.
        link = self._from_disk_link if self._unified else UP
        device = device_seconds(work, hardware, share)
        busy[link], slowed = beside(busy[link], device, hardware)
        busy[COMPUTE] *= slowed / device if device else 1.0
        longest = max(sweep_seconds(work, hardware, share), slowed, together, *busy.values())
        if share and batches < 2:
            # Nobody computes while the only one's rows are attended to.
            longest = max(longest, busy[COMPUTE] + busy[HOST_ATTENTION] + work.program)
        return SweepTerms(longest, busy)

    def rows_within(self, seconds: float) -> int:
        """Rows of prompts that the device computes in that time, up to all that a sweep has."""

        def computing(rows: int) -> float:
            return self.terms(SweepLoad(rows, 0.0, 0.0, 0.0, 0.0)).busy[COMPUTE]

        return bisect_right(range(1, self.policy.max_rows + 1), seconds, key=computing)

    def _work(self, load: SweepLoad, pages: int, share: float) -> SweepWork:
        """Of link, device and processor if HOST attends to `share` of the `pages`."""
        shape, hardware, kv = self.shape, self.hardware, self._kv
        batches = micro_batches(self.policy, load.rows)
        here = load.read * shape.kv_token_bytes - share * pages
        part = here / (load.read * shape.kv_token_bytes) if load.read else 0.0
        attending = attention_seconds(
            shape, hardware, part * load.read, here, load.positions - load.read
        )
        layers = layer_seconds(shape, hardware, load.rows, batches, self._in_place)
        away = 0.0 if self._unified else kv[Tier.DISK]
        moved = load.read * away + load.stored * (kv[Tier.HOST] + away)
        return SweepWork(
            weights=0 if self._unified else int(self.streamed + moved),
            host_kv=pages,
            compute=self._expansion + layers + attending,
            around=head_seconds(shape, hardware, load.generating, batches, self._head_in_place),
            program=program_seconds(hardware, batches),
        )

    def _waiting(self, work: SweepWork, batches: int, share: float) -> float:
        """Seconds in which the device waits for rows on their way to HOST's attention and back, and
        for those of an embedding table that is elsewhere.

        What is urgent waits for the requests of weights before it, unless other micro-batches have
        something to compute meanwhile. Driving each call takes its time in any case.
        """
        if self._unified:
            return 0.0
        hardware, layers = self.hardware, self.shape.num_layers if share else 0
        link = busy_seconds(work, hardware, share)[UP]
        device = device_seconds(work, hardware, share)
        part = link / max(link, device) if link else 0.0
        request = min(REQUEST_BYTES, self.streamed / self.shape.num_layers)
        before = part * REQUESTS_BEFORE * request / hardware.host_to_device
        urgent = self._gathers + (layers if batches < 2 else 0)
        return batches * layers * hardware.hosted_call + urgent * before

    def _moved(
        self, load: SweepLoad, work: SweepWork, share: float
    ) -> dict[str, tuple[float, float]]:
        """Bytes of every link, and its speed."""
        hardware, kv = self.hardware, self._kv
        read = self.from_disk + (load.read + load.stored) * kv[Tier.DISK]
        moved = {
            self._from_disk_link: (read, hardware.disk_read),
            TO_DISK: (load.rows * kv[Tier.DISK], hardware.disk_write),
        }
        if self._unified:
            return moved
        hosted = load.generating * share * self.shape.num_layers
        parked = load.rows * self._parked
        up = work.weights + (1 - share) * work.host_kv + hosted * self._hosted[Tier.DEVICE] + parked
        down = load.rows * (kv[Tier.HOST] + kv[Tier.DISK]) + parked
        down += hosted * (self._hosted[Tier.HOST] - self._hosted[Tier.DEVICE])
        return moved | {
            UP: (up, hardware.host_to_device),
            DOWN: (down, hardware.device_to_host),
        }

    def _host_share(self, work: SweepWork) -> float:
        """Of the pages on HOST that single rows attend to there."""
        if not work.host_kv or self.policy.attention == "device":
            return 0.0
        if self.policy.attention == "host":
            return 1.0
        return best_host_share(work, self.hardware)


def in_place(shape: ModelShape, policy: Policy, *, unified: bool) -> tuple[float, float]:
    """Parts of the layers' and of the head's weights that are computed with where and as they are
    stored.
    """
    if not shape.tensors:
        here = (Tier.DEVICE, Tier.HOST) if unified else (Tier.DEVICE,)
        layers = head = sum(policy.weights.fraction(tier) for tier in here)
    else:
        placed = placed_weights(shape, policy.weights, unified=unified)
        layers, head = placed.in_place, placed.head_in_place
    if not shape.expanded_in_sweep:
        return layers, head
    # A head is often left as it is where layers are quantized.
    plain_head = shape.head_bytes >= shape.head_flops_per_row // 2 * shape.value_bytes
    return 0.0, head if plain_head else 0.0


def _gathers(shape: ModelShape, policy: Policy, *, unified: bool) -> bool:
    """Whether an embedding table of its own is elsewhere than where it is computed with."""
    return bool(shape.tensors) and placed_weights(shape, policy.weights, unified=unified).gathers


def disk_page_seconds(shape: ModelShape, policy: Policy) -> float:
    """For a byte of pages on DISK, besides what the disk takes for a byte of a stream."""
    return PAGE_SECONDS / (max(shape.kv_bytes_per_token) * policy.page_tokens)


def micro_batches(policy: Policy, rows: float) -> int:
    """That a sweep of `rows` is cut into."""
    fewest = math.ceil(rows / policy.micro_batch_rows)
    return max(fewest, min(policy.num_micro_batches or 1, math.ceil(rows)))


def streamed_bytes(shape: ModelShape, policy: Policy, *, unified: bool) -> tuple[int, int]:
    """Bytes of weights that reach the device in each sweep, and those of them from disk.

    Of an embedding table of its own only rows are read.
    """
    if shape.tensors:
        homes = placed_weights(shape, policy.weights, unified=unified).used
    else:
        homes = {t: int(shape.weight_bytes * policy.weights.fraction(t)) for t in Tier}
    from_disk = homes[Tier.DISK]
    return from_disk + (0 if unified else homes[Tier.HOST]), from_disk
