"""What would make a job faster: the same search for a machine with more of one thing (no torch)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from offload.errors import CapacityError
from offload.tiers import Tier, format_size
from policy_search.errors import PolicyError
from policy_search.hardware import with_factors
from policy_search.memory import longest_held
from policy_search.sweep_load import COMPUTE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from policy_search.goal import Goal
    from policy_search.job_pricing import Candidate
    from policy_search.search import Search

WORTH_TELLING = 1.05
_TIMES = 2.0
"""Of a speed."""
_GIB = 1 << 30


class Advice(NamedTuple):
    """One change, and the throughput over what it is."""

    change: str
    factor: float


def advise(search: Search, goal: Goal, best: Candidate) -> list[Advice]:
    """Changes that help, the best first; tried with batches of about the size of the `best` one,
    and room for as long sequences.
    """
    found = []
    held = longest_held(search.shape, best.policy, best.memory)
    like = replace(search, around=best.policy, room_for=min(search.needed_tokens, held))
    for change, other in _variants(like):
        try:
            rate = goal.best(other.run()).prediction.tokens_per_second
        except (CapacityError, PolicyError):
            continue  # what is planned around needs the machine that it was found for
        factor = rate / best.prediction.tokens_per_second
        if factor >= WORTH_TELLING:
            found.append(Advice(change, factor))
    return sorted(found, key=lambda each: -each.factor)


def _variants(search: Search) -> Iterator[tuple[str, Search]]:
    for tier, what in ((Tier.HOST, "RAM"), (Tier.DEVICE, "GPU memory")):
        if search.unified and tier is Tier.HOST:
            continue
        more = _a_quarter(search.limits[tier])
        limits = {**search.limits, tier: search.limits[tier] + more}
        what = "RAM" if search.unified else what
        yield f"+{format_size(more).replace('.00', '')} of {what}", replace(search, limits=limits)
    hw = search.hardware
    faster = {
        "a disk twice as fast": {"disk_read": hw.disk_read, "disk_write": hw.disk_write},
        "a link to the GPU twice as fast": {
            "host_to_device": hw.host_to_device,
            "device_to_host": hw.device_to_host,
            "links_together": hw.links_together,
        },
        "twice the memory bandwidth for attention in RAM": {"host_attention": hw.host_attention},
    }
    for change, speeds in faster.items():
        values: dict[str, Any] = {name: _TIMES * value for name, value in speeds.items()}
        yield change, replace(search, hardware=replace(hw, **values))
    device = with_factors(hw, {COMPUTE: 1 / _TIMES})
    yield "a device twice as fast", replace(search, hardware=device)


def _a_quarter(nbytes: int) -> int:
    """More, as memory is sold: a power of two of about a quarter of what there is."""
    return max(_GIB, 1 << max(0, (nbytes // 4).bit_length()))
