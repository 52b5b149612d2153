"""Tokens per second that a policy is predicted to generate: sweeps of the cost model (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.placement import place
from offload.tiers import Tier
from policy_search.cost_model import (
    SweepWork,
    best_host_share,
    busy_seconds,
    expansion_seconds,
    head_seconds,
    product_seconds,
    sweep_seconds,
)
from policy_search.workload import JobLengths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from policy_search.hardware import Hardware
    from policy_search.memory import TierMemory
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy


def predicted_rate(
    shape: ModelShape,
    policy: Policy,
    memory: Mapping[Tier, TierMemory],
    job: JobLengths,
    hardware: Hardware,
    *,
    unified: bool,
) -> float:
    """Generated tokens per second over the whole `job`; `memory` is what `policy` takes.

    First as many prompts as may run together are computed, then their sequences generate, and the
    prompts of those that take their places ride along. Where the KV cache has no room for a mean
    sequence, longer ones than it has room for fail: what it has of a mean one is the part of the
    job that counts, in sequences of that length.
    """
    room = sum(used.kv for used in memory.values()) / shape.kv_token_bytes
    served = min(1.0, room / (job.prompt + job.output))
    job = JobLengths(job.sequences, served * job.prompt, served * job.output)
    # A sequence grows as it generates, and its last page is half empty.
    held = job.prompt + (job.output + policy.page_tokens) / 2
    running = max(1.0, min(policy.max_sequences, job.sequences, room / held))
    sweeps = _Sweeps(shape, policy, memory, job, hardware, unified)
    prompts = running * job.prompt
    filling = max(1, math.ceil(prompts / policy.max_rows))
    seconds = filling * sweeps.seconds(prompts / filling, 0.0)
    tokens = job.sequences * job.output
    rows = tokens + (job.sequences - running) * job.prompt
    count = max(tokens / running, rows / policy.max_rows)
    seconds += count * sweeps.seconds(rows / count, tokens / count)
    return served * tokens / seconds if seconds else math.inf


@dataclass(frozen=True, slots=True)
class _Sweeps:
    """What a sweep takes under one policy."""

    shape: ModelShape
    policy: Policy
    memory: Mapping[Tier, TierMemory]
    job: JobLengths
    hardware: Hardware
    unified: bool

    def seconds(self, rows: float, generating: float) -> float:
        """Of a sweep of `rows`, of which `generating` are newest tokens of sequences."""
        shape, hardware = self.shape, self.hardware
        context = self.job.prompt + self.job.output / 2
        read = generating * context
        positions = read + (rows - generating) * self.job.prompt / 2
        streamed, from_disk = streamed_bytes(shape, self.policy, unified=self.unified)
        on_host, on_disk = (read * nbytes for nbytes in self._kv_bytes_away())
        batches = math.ceil(rows / self.policy.micro_batch_rows)
        work = SweepWork(
            weights=0 if self.unified else int(streamed + on_disk),
            host_kv=0 if self.unified else int(on_host),
            compute=expansion_seconds(shape, hardware)
            + product_seconds(shape, hardware, math.ceil(rows), math.ceil(positions), batches),
            around=head_seconds(shape, hardware, generating),
        )
        share = self._host_share(work)
        disk = (from_disk + on_disk) / hardware.disk_read
        if not self.policy.overlap:
            return sum(busy_seconds(work, hardware, share).values()) + disk
        return max(sweep_seconds(work, hardware, share), disk)

    def _kv_bytes_away(self) -> tuple[float, float]:
        """Of one stored token, the bytes on HOST and on DISK: all sequences have an equal share."""
        total = sum(used.kv for used in self.memory.values())
        host, disk = (self.memory[tier].kv / total for tier in (Tier.HOST, Tier.DISK))
        return host * self.shape.kv_token_bytes, disk * self.shape.kv_token_bytes

    def _host_share(self, work: SweepWork) -> float:
        if self.policy.attention == "auto":
            return best_host_share(work, self.hardware)
        return float(self.policy.attention == "host")


def streamed_bytes(shape: ModelShape, policy: Policy, *, unified: bool) -> tuple[int, int]:
    """Bytes of weights that reach the device in each sweep, and those of them from disk.

    Of an embedding table of its own only rows are read.
    """
    if shape.tensors:
        tiers = place(shape.tensors, policy.weights)
        used = [tensor for tensor in shape.tensors if tensor.unit >= 0]
        homes = {t: sum(each.nbytes for each in used if tiers[each.name] is t) for t in Tier}
    else:
        homes = {t: int(shape.weight_bytes * policy.weights.fraction(t)) for t in Tier}
    from_disk = homes[Tier.DISK]
    return from_disk + (0 if unified else homes[Tier.HOST]), from_disk
