"""The bits of weights and KV cache that a job's plan is fastest with, where it may choose them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compression.selection import PLAIN_BITS
from policy_search.bits import BitsRate, choose_bits, combinations

if TYPE_CHECKING:
    from flexrun.config import EngineConfig
    from flexrun.model_plan import ModelPlan, ModelPlanner


@dataclass(frozen=True, slots=True)
class ChosenBits:
    """What was chosen and why."""

    text: str
    """For people, a few lines."""
    summary: dict[str, Any]
    """The same for programs."""


def with_chosen_bits(
    config: EngineConfig, planner: ModelPlanner
) -> tuple[EngineConfig, ChosenBits | None]:
    """`config` with bits where it has none and may have any; None where nothing is to be chosen.

    Each combination is planned like a job of its own. Raises `CapacityError` if nothing fits.
    """
    if planner.checkpoint.packed and config.allow_quantization and config.weight_bits is None:
        config = replace(config, weight_bits=PLAIN_BITS)  # its matrices keep the bits they have
    if not config.free_bits:
        return config, None
    plans: dict[tuple[int, int], ModelPlan] = {}

    def rate(weight_bits: int, kv_bits: int) -> BitsRate:
        plan = planner.plan(replace(config, weight_bits=weight_bits, kv_bits=kv_bits))
        plans[weight_bits, kv_bits] = plan
        assert plan.prediction is not None
        return BitsRate(plan.prediction.tokens_per_second, plan.room_for)

    choice = choose_bits(combinations(config.weight_bits, config.kv_bits), rate)
    bits = choice.chosen.weight_bits, choice.chosen.kv_bits
    job, cost = plans[bits].job, plans[bits].cost
    assert cost is not None
    found = ChosenBits(choice.text(job, cost.hardware), choice.as_json(job))
    return replace(config, weight_bits=bits[0], kv_bits=bits[1]), found
