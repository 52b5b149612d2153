"""The least RAM that a job needs, for a machine that others use, too (no torch)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offload.errors import CapacityError
from offload.tiers import Tier
from policy_search.errors import PolicyError

if TYPE_CHECKING:
    from policy_search.planner import Plan, Planner
    from policy_search.policy import Policy

ENOUGH = 0.95
"""Of the throughput with all RAM, where there is no deadline."""
_STEPS = 7
"""Of bisection: to under 1 % of the RAM."""


def with_least_memory(planner: Planner, quantized: Policy) -> Plan:
    """The plan with the least RAM that meets the goal. Raises `CapacityError` and `PolicyError`."""
    best = planner.plan(quantized)
    wanted = ENOUGH * best.prediction.tokens_per_second
    if planner.goal.deadline is not None:
        wanted = 0.0  # the goal says how fast is fast enough
    tier = Tier.DEVICE if planner.unified else Tier.HOST
    least, most = 0, planner.limits[tier]
    for _ in range(_STEPS):
        middle = (least + most) // 2
        limits = {**planner.limits, tier: middle}
        try:
            plan = replace(planner, limits=limits).plan(quantized)
        except (CapacityError, PolicyError):
            least = middle
            continue
        if plan.prediction.tokens_per_second >= wanted and plan.room_for >= best.room_for:
            best, most = plan, middle
        else:
            least = middle
    return best
