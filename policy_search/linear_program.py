"""The linear program: shares of weights, pages and hidden states on every tier (no torch).

FlexGen's program (ICML 2023, section 4.3), with a sweep's time as the largest of its terms, two
kinds of sweeps in one program, and the share of pages that are attended to in RAM as a variable.
All that is not linear in the shares (how large the batch is, bits, rows at once) is given.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from offload.tiers import Tier
from policy_search.sweep_load import COMPUTE, HOST_ATTENTION

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pulp

    from policy_search.hardware import Hardware

UP, DOWN, FROM_DISK, TO_DISK = "host->device", "device->host", "disk->host", "host->disk"
TOGETHER = "links together"
SLOWER_TIER = 2e-4
"""Of the seconds that its bytes take anyway."""


class PhaseBytes(NamedTuple):
    """One kind of a job's sweeps: all that its terms depend on besides the shares."""

    sweeps: float
    compute: float
    """Seconds of the device, without attention of single rows."""
    around: float
    """Seconds of it in which nobody attends."""
    read: float
    """Bytes of keys and values that single rows attend to."""
    stored: float
    """Bytes of them that rows of prompts attend to, which are always attended to on the device."""
    new: float
    """Bytes of keys and values that are added."""
    hidden: float
    """Bytes of hidden states that leave and come back if they wait on HOST."""
    sent: float
    """Bytes to HOST for the attention of all single rows there."""
    results: float
    """Bytes back from there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A placement to find."""

    phases: tuple[PhaseBytes, ...]
    weights: float
    """Bytes that can be placed, …"""
    streamed: float
    """… and those of them that cross a link in every sweep if they are not on the device."""
    on_disk: float
    """What all of them take of DISK's room: nothing where they are in the model's files, or in a
    store that is there anyway."""
    kv: float
    """Bytes of pages that all running sequences need."""
    hidden: float
    """Bytes of hidden states that wait, all of a sweep's micro-batches'."""
    room: Mapping[Tier, float]
    """Bytes for these three; where weights are streamed, without their buffers."""
    hardware: Hardware
    unified: bool
    attention: str = "auto"
    page_seconds: float = 0.0
    """Of the disk for a byte of pages, besides those of a stream."""
    fixed_weights: Mapping[Tier, float] | None = None
    """Shares that are given; what is not there is to be found."""
    fixed_kv: Mapping[Tier, float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What is found."""

    weights: dict[Tier, float]
    kv: dict[Tier, float]
    hidden_on_host: float
    attended: float
    """Of all pages, those that are attended to on HOST."""
    seconds: float
    """Of all sweeps."""


def terms(problem: Problem, phase: PhaseBytes, shares: Any) -> dict[str, list[Any]]:
    """Seconds of every resource in one sweep, as expressions: a sweep takes the largest of all.

    `shares` has numbers or the variables of a program.
    """
    hw, kv = problem.hardware, shares.kv  # multiplied by inverses: speeds may be infinite
    away = 0 if problem.unified else shares.weights[Tier.HOST]
    streamed = problem.streamed * (away + shares.weights[Tier.DISK])
    moved = (phase.read + phase.stored) * (kv[Tier.HOST] + kv[Tier.DISK])
    parked = phase.hidden * shares.hidden_on_host
    up = streamed + moved - phase.read * shares.attended + parked
    up = up + phase.results * shares.attended
    down = phase.new * (kv[Tier.HOST] + kv[Tier.DISK]) + parked + phase.sent * shares.attended
    read = problem.streamed * shares.weights[Tier.DISK]
    pages = (phase.read + phase.stored) * kv[Tier.DISK]
    written = phase.new * kv[Tier.DISK]
    device = phase.compute + phase.around
    if hw.device_attention < math.inf:
        device = device + phase.read * (1 - shares.attended) * (1 / hw.device_attention)
    hosted = phase.read * shares.attended * (1 / hw.host_attention)
    contended = hw.contention / (1 - hw.contention)
    # Of each second of the other one; both together are no slower than one after the other.
    lost, loses = (
        min(1.0, hw.compute_lost / (1 - hw.link_lost)),
        min(1.0, hw.link_lost / (1 - hw.compute_lost)),
    )
    arriving = (
        (read + pages) * (1 / hw.disk_read) if problem.unified else up * (1 / hw.host_to_device)
    )
    found = {
        FROM_DISK: [(read + pages) * (1 / hw.disk_read) + pages * problem.page_seconds],
        TO_DISK: [written * (1 / hw.disk_write)],
        # While both work, each slows the other down: the longer one, and a part of the shorter.
        COMPUTE: [
            expression
            for both in (device + hosted * contended, hosted + device * contended)
            for expression in (both + arriving * lost, arriving + both * loses)
        ],
        HOST_ATTENTION: [hosted],
    }
    if problem.unified:
        return found
    links = up + down + read + pages + written
    return found | {
        UP: [up * (1 / hw.host_to_device)],
        DOWN: [down * (1 / hw.device_to_host)],
        TOGETHER: [links * (1 / hw.links_together)],
    }


def seconds(problem: Problem, shares: Shares) -> float:
    """Of all sweeps under `shares`."""
    total = 0.0
    for phase in problem.phases:
        values = terms(problem, phase, shares).values()
        total += phase.sweeps * max(value for each in values for value in each)
    return total


def solve(problem: Problem) -> Shares | None:
    """The shares with the least time for all sweeps; None where nothing fits."""
    import pulp  # it takes a while, and most commands never solve anything

    if min(problem.room.values()) < 0:
        return None
    program = pulp.LpProblem("placement", pulp.LpMinimize)
    shares = _variables(problem, program)
    times = [pulp.LpVariable(f"t{n}", lowBound=0) for n in range(len(problem.phases))]
    on_disk = shares.weights[Tier.DISK] + shares.kv[Tier.DISK]
    total = pulp.lpSum(phase.sweeps * t for phase, t in zip(problem.phases, times))
    program += total + _last_resort(problem) * on_disk
    for phase, time in zip(problem.phases, times):
        for values in terms(problem, phase, shares).values():
            for value in values:
                program += time >= value
    for tier in Tier:
        weights = problem.on_disk if tier is Tier.DISK else problem.weights
        used = weights * shares.weights[tier] + problem.kv * shares.kv[tier]
        if tier is Tier.HOST:
            used += problem.hidden * shares.hidden_on_host
        if tier is Tier.DEVICE:
            used -= problem.hidden * shares.hidden_on_host
        unit = max(1.0, problem.room[tier])  # solvers want numbers that are not too large
        program += used * (1 / unit) <= problem.room[tier] / unit
    if program.solve(_solver()) != pulp.LpStatusOptimal:
        return None
    return _values(problem, shares)


def _last_resort(problem: Problem) -> float:
    """Seconds that all bytes on DISK count more: of shares as fast, those with fewer there."""
    nbytes = sum(phase.sweeps * (problem.streamed + phase.read) for phase in problem.phases)
    speed = min(problem.hardware.host_to_device, problem.hardware.disk_read)
    return SLOWER_TIER * nbytes / speed


class _Variables(NamedTuple):
    weights: dict[Tier, Any]
    kv: dict[Tier, Any]
    hidden_on_host: Any
    attended: Any


def _variables(problem: Problem, program: pulp.LpProblem) -> _Variables:
    import pulp

    def share(name: str, most: float = 1.0) -> Any:
        return pulp.LpVariable(name, lowBound=0, upBound=most)

    host = 0.0 if problem.unified else 1.0
    highest = {Tier.DEVICE: 1.0, Tier.HOST: host, Tier.DISK: 1.0}
    found = _Variables(
        {tier: share(f"w_{tier.value}", highest[tier]) for tier in Tier},
        {tier: share(f"c_{tier.value}", highest[tier]) for tier in Tier},
        share("h_host", host),
        share("attended", 0.0 if problem.attention == "device" else host),
    )
    for split, given in (
        (found.weights, problem.fixed_weights),
        (found.kv, problem.fixed_kv),
    ):
        program += pulp.lpSum(split.values()) == 1
        for tier, part in (given or {}).items():
            program += split[tier] == part
    program += found.attended <= found.kv[Tier.HOST]
    if problem.attention == "host":
        program += found.attended == found.kv[Tier.HOST]
    return found


def _values(problem: Problem, shares: _Variables) -> Shares:
    def number(variable: Any) -> float:
        return min(1.0, max(0.0, variable.value() or 0.0))

    found = Shares(
        weights={tier: number(each) for tier, each in shares.weights.items()},
        kv={tier: number(each) for tier, each in shares.kv.items()},
        hidden_on_host=number(shares.hidden_on_host),
        attended=number(shares.attended),
        seconds=0.0,
    )
    return replace(found, seconds=seconds(problem, found))


@cache
def _solver() -> Any:
    """HiGHS solves in a millisecond; CBC, which PuLP has with it, is a process for each program."""
    import pulp

    highs = pulp.HiGHS(msg=False)
    if not highs.available():
        return pulp.PULP_CBC_CMD(msg=False)
    _greet()
    return highs


def _greet() -> None:
    """HiGHS prints whose it is when it is first used. On stdout there may be JSON: on stderr."""
    import highspy

    try:
        kept = os.dup(1)
    except OSError:
        return  # nobody listens
    sys.stdout.flush()
    try:
        os.dup2(2, 1)
        highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
