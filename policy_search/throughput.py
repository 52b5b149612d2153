"""How long a job takes under a policy: two kinds of sweeps, each from the cost model (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from policy_search.sweep_cost import SweepCost
from policy_search.sweep_load import SweepLoad
from policy_search.workload import JobLengths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload.tiers import Tier
    from policy_search.hardware import Hardware
    from policy_search.memory import TierMemory
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy


TAIL = 0.6
NEARLY = 0.02
"""Part of a block that is none: the KV cache has room for a little less than is thought."""


class Phase(NamedTuple):
    """Sweeps that are alike."""

    sweeps: float
    load: SweepLoad


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPhases:
    """First as many prompts as may run together are computed, then their sequences generate, and
    the prompts of those that take their places ride along.
    """

    filling: Phase
    generating: Phase
    running: float
    """Sequences at the same time."""
    tokens: float
    """That are generated in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a job takes."""

    tokens_per_second: float
    """Generated ones, over the whole job."""
    prefill_seconds: float
    """Of sweeps of prompts only, before any sequence generates."""
    decode_seconds: float
    """Of sweeps in which sequences generate; other prompts ride along."""
    sweep_seconds: float
    """Of one of these."""
    request_seconds: float
    """From the job's start to the last token of a sequence of mean length of those that are the
    first to run; others take no longer from when they begin."""
    running: float
    busy: dict[str, float]
    """Seconds in which each resource works."""

    @property
    def job_seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    @property
    def bound(self) -> str:
        """The resource that works longest."""
        return max(self.busy, key=lambda name: self.busy[name])

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "tokens_per_second": self.tokens_per_second,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "job_seconds": self.job_seconds,
            "sweep_seconds": self.sweep_seconds,
            "request_seconds": self.request_seconds,
            "running_sequences": self.running,
            "terms": {name: seconds for name, seconds in self.busy.items() if seconds},
        }


def predict(
    shape: ModelShape,
    policy: Policy,
    memory: Mapping[Tier, TierMemory],
    job: JobLengths,
    hardware: Hardware,
    *,
    unified: bool,
) -> Prediction:
    """Of the whole `job`; `memory` is what `policy` takes.

    Where the KV cache has no room for a mean sequence, longer ones than it has room for fail: what
    it has of a mean one is the part of the job that counts, in sequences of that length.
    """
    room = sum(used.kv for used in memory.values()) / shape.kv_token_bytes
    served = min(1.0, room / (job.prompt + job.output))
    prompt, output, longest = (served * each for each in (job.prompt, job.output, job.longest))
    job = JobLengths(job.sequences, prompt, output, longest)
    phases = job_phases(policy, room, job)
    cost = SweepCost(shape, policy, memory, hardware, unified=unified)
    filling, generating = (cost.terms(p.load) for p in (phases.filling, phases.generating))
    counts = phases.filling.sweeps, phases.generating.sweeps
    prefill, decode = counts[0] * filling.seconds, counts[1] * generating.seconds
    names = dict.fromkeys([*filling.busy, *generating.busy])
    both = filling.busy, generating.busy
    busy = {n: sum(c * b.get(n, 0.0) for c, b in zip(counts, both)) for n in names}
    tokens, seconds = served * phases.tokens, prefill + decode
    return Prediction(
        tokens_per_second=tokens / seconds if seconds else math.inf,
        prefill_seconds=prefill,
        decode_seconds=decode,
        sweep_seconds=generating.seconds,
        request_seconds=prefill + job.output * generating.seconds,
        running=phases.running,
        busy=busy,
    )


def job_phases(policy: Policy, room: float, job: JobLengths) -> JobPhases:
    """The sweeps of `job`, whose mean sequence fits, with `room` for so many tokens of KV cache."""
    held = held_tokens(policy, job)
    running = max(1.0, min(policy.max_sequences, job.sequences, room / held))
    prompts = running * job.prompt
    fills = max(1, math.ceil(prompts / policy.max_rows))
    tokens = job.sequences * job.output
    rows = tokens + (job.sequences - running) * job.prompt
    count = max(tokens / running, rows / policy.max_rows) + _drain(job, running)
    return JobPhases(
        filling=Phase(fills, _load(policy, job, prompts / fills, 0.0)),
        generating=Phase(count, _load(policy, job, rows / count, tokens / count)),
        running=running,
        tokens=tokens,
    )


def held_tokens(policy: Policy, job: JobLengths) -> float:
    """That a running sequence has pages for: it grows as it generates, its last page is half empty,
    and the scheduler keeps another one free for it. Of many sequences some are young and some old;
    those of a few blocks are old together.
    """
    old = min(1.0, 4 * policy.max_sequences / job.sequences)
    return job.prompt + job.output * (1 + old) / 2 + 1.5 * policy.page_tokens


def _drain(job: JobLengths, running: float) -> float:
    """Sweeps in which places are empty, because nothing waits any more.

    Sequences of one length end together, the last ones in a block that may be small. Of different
    ones the last to end are long: all of what the longest has beyond the mean where they begin
    together, and `TAIL` of it after many blocks (simulated on published lengths: 40 to 1 024
    requests in one to eight blocks; of two blocks 0.64 to 0.98).
    """
    longest = max(job.output, job.longest)
    blocks = job.sequences / running
    alike = (job.output / longest) ** 2 if longest else 0.0
    last_block = max(0.0, math.ceil(blocks - NEARLY) - blocks) * job.output * alike
    tail = TAIL + (1 - TAIL) / max(1.0, blocks)
    return last_block + tail * (longest - job.output)


def _load(policy: Policy, job: JobLengths, rows: float, generating: float) -> SweepLoad:
    """A sweep of `rows`, of which `generating` are newest tokens of sequences."""
    read = generating * (job.prompt + job.output / 2)
    prompts = rows - generating
    chunk = min(policy.micro_batch_rows, policy.max_rows)
    return SweepLoad(
        rows=rows,
        generating=generating,
        read=read,
        positions=read + prompts * job.prompt / 2,
        # The chunks of a prompt before a row's own have been stored: half of them, on average.
        stored=prompts * max(0.0, job.prompt / chunk - 1) / 2,
    )
