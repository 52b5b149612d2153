"""The bits of weights and KV cache that a job's plan is fastest with, where it may choose them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from compression.selection import PLAIN_BITS
from flexrun.machine_speeds import MachineSpeeds
from policy_search.bits import choose_bits, combinations
from policy_search.memory import memory_of
from policy_search.throughput import predict as predict_job
from policy_search.workload import JobLengths, Workload

if TYPE_CHECKING:
    from flexrun.config import EngineConfig
    from flexrun.model_plan import ModelPlanner
    from policy_search.hardware import Hardware


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

    Each combination is planned like a job of its own. What the plans need of the machine is
    measured, once. Raises `CapacityError` if nothing fits.
    """
    if planner.checkpoint.packed and config.allow_quantization and config.weight_bits is None:
        config = replace(config, weight_bits=PLAIN_BITS)  # its matrices keep the bits they have
    if not config.free_bits:
        return config, None
    context, unified = planner.model.context_length, planner.backend.unified
    job = (config.job_lengths or JobLengths.of(Workload().lengths())).within(context)
    speeds = MachineSpeeds(planner)
    measured: dict[tuple[int, int], Hardware] = {}

    def predict(weight_bits: int, kv_bits: int) -> float:
        plan = planner.plan(replace(config, weight_bits=weight_bits, kv_bits=kv_bits))
        known = plan.shape, plan.policy
        memory = memory_of(*known, planner.limits, context, unified=unified)
        hardware = measured[weight_bits, kv_bits] = speeds.of(plan, memory)
        return predict_job(*known, memory, job, hardware, unified=unified).tokens_per_second

    with torch.inference_mode():
        choice = choose_bits(combinations(config.weight_bits, config.kv_bits), predict)
    bits = choice.chosen.weight_bits, choice.chosen.kv_bits
    found = ChosenBits(choice.text(job, measured[bits]), choice.as_json(job))
    return replace(config, weight_bits=bits[0], kv_bits=bits[1]), found
