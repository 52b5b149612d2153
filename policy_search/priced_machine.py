"""The machine of a simulation: what its sweeps take, and how large they may be (no torch)."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.tiers import format_size
from policy_search.cost_model import free_rows, weight_seconds
from policy_search.errors import PolicyError
from policy_search.flags import AUTO, quantized_policy, stated_hardware
from policy_search.memory import memory_of
from policy_search.named_models import named_config
from policy_search.operators import compute_seconds, expansion_seconds
from policy_search.planned_machine import planned_machine
from policy_search.planner import for_kv_bits
from policy_search.policy import Policy
from policy_search.profiles import PROFILES
from policy_search.shape_from_config import shape_from_config
from policy_search.sweep_cost import SweepCost
from policy_search.sweep_load import COMPUTE, SweepLoad, SweepTerms

if TYPE_CHECKING:
    from collections.abc import Callable

    from policy_search.simulated_job import SimulatedJob

DEFAULT_MODEL = "llama-2-13b"
"""What is simulated unless another one is given."""
MAX_SEQUENCES = 64
"""Running at once, unless a number is given, or a policy."""
PROFILE_ROWS = 2048
"""Of prompts in a sweep of a profile, or the longest prompt's (Splitwise's max_batch_tokens)."""


_SPEEDS = ("link", "disk_read", "host_attention", "expansion", "matrix_read", "tflops")
_OF_A_MACHINE = (*_SPEEDS, "device_memory", "host_memory", "disk_space")
"""Flags that change what is known of the machine of --hardware."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PricedMachine:
    """What every machine of a simulation is."""

    kv_token_bytes: int
    cost: Callable[[SweepLoad], SweepTerms]
    max_sequences: int
    max_rows: int
    micro_batch_rows: int
    weight_seconds: float
    """That weights take to arrive in every sweep."""
    description: str
    """Of what a sweep takes, in words."""
    kv_tokens: int | None = None
    """Room of the KV cache; None: as the job needs."""
    devices: int = 1
    """GPUs that it has."""

    @classmethod
    def asked_for(cls, arguments: argparse.Namespace, job: SimulatedJob) -> PricedMachine:
        """With --profile what was measured, with --policy a plan on a machine, else what --model,
        --hardware and speeds say. Raises `FlexrunError`.
        """
        if arguments.profile:
            return _profiled(arguments, job)
        return _planned(arguments) if arguments.policy else _stated(arguments)

    @classmethod
    def of_prompts(cls, arguments: argparse.Namespace, job: SimulatedJob) -> PricedMachine | None:
        """The same with what --prompt-profile, --prompt-policy and --prompt-hardware say instead;
        None if none of them is given.
        """
        names = ("profile", "policy", "hardware")
        given = {name: getattr(arguments, f"prompt_{name}") for name in names}
        other = {name: value for name, value in given.items() if value is not None}
        if not other:
            return None
        if "hardware" in other:
            # What flags say of a machine's memories and speeds is of the other one.
            other |= dict.fromkeys(_OF_A_MACHINE) | {"unified": False}
        return cls.asked_for(argparse.Namespace(**vars(arguments) | other), job)


def _stated(arguments: argparse.Namespace) -> PricedMachine:
    """A machine with the speeds of the command line, or of one by name, and its weights on their
    way.
    """
    config = named_config(arguments.model or DEFAULT_MODEL)
    if arguments.hardware == AUTO:
        hardware, where = stated_hardware(arguments), ""
    else:
        machine = planned_machine(arguments, config)
        hardware, where = machine.hardware, f" on {machine.name}"
        if machine.unified or not math.isfinite(hardware.flops):
            missing = "no link that weights come over" if machine.unified else "no flops"
            raise PolicyError(
                f"{machine.name} has {missing}, so sweeps have no price without a plan",
                hint="give a plan for it: `policy-search ... -o FILE`, then --policy FILE",
            )
    stored, computed = config.types("auto", unified=False)
    shape = shape_from_config(config, stored, computed, quantized_policy(arguments).quantization)
    streamed = shape.weight_bytes if arguments.streamed is None else arguments.streamed
    arriving = weight_seconds(streamed, 0, hardware)
    expanding = expansion_seconds(shape, hardware)

    def cost(load: SweepLoad) -> SweepTerms:
        rows, positions = int(load.rows), int(load.positions)
        computing = expanding + compute_seconds(shape, hardware, rows, positions)
        busy = {"host->device": arriving, COMPUTE: computing}
        return SweepTerms(max(arriving, computing), busy)

    free = int(free_rows(shape, hardware, arriving))
    max_sequences = arguments.max_sequences or MAX_SEQUENCES
    return PricedMachine(
        max_sequences=max_sequences,
        kv_token_bytes=shape.kv_token_bytes,
        cost=cost,
        max_rows=arguments.max_rows or max(max_sequences + 1, free),
        micro_batch_rows=Policy().micro_batch_rows,
        weight_seconds=arriving,
        description=f"each with {format_size(streamed)} of weights in {arriving:.3f} s or more"
        f"{where}",
    )


def _planned(arguments: argparse.Namespace) -> PricedMachine:
    """A machine that runs under a policy, with every term of the cost model."""
    config, policy = named_config(arguments.model or DEFAULT_MODEL), Policy.load(arguments.policy)
    machine = planned_machine(arguments, config)
    unified, context = machine.unified, config.context_length
    stored, computed = config.types(arguments.dtype, unified=unified)
    shape = shape_from_config(config, stored, computed, policy.quantization)
    memory = memory_of(shape, policy, machine.limits, context, unified=unified)
    speeds = for_kv_bits(machine.hardware, policy.kv_bits, unified=unified)
    cost = SweepCost(shape, policy, memory, speeds, unified=unified)
    pages = sum(used.kv for used in memory.values()) // shape.kv_token_bytes
    return PricedMachine(
        kv_token_bytes=shape.kv_token_bytes,
        cost=cost.terms,
        max_sequences=arguments.max_sequences or policy.max_sequences,
        max_rows=arguments.max_rows or policy.max_rows,
        micro_batch_rows=policy.micro_batch_rows,
        weight_seconds=weight_seconds(cost.streamed, cost.from_disk, speeds),
        description=f"under {arguments.policy} on {machine.name}",
        kv_tokens=pages,
    )


def _profiled(arguments: argparse.Namespace, job: SimulatedJob) -> PricedMachine:
    """A machine that was measured. Prompts are in one piece there, unless --max-rows is less."""
    profile = PROFILES[arguments.profile]
    longest = max((request.prompt for request in job.requests), default=1)
    max_sequences = arguments.max_sequences or MAX_SEQUENCES
    max_rows = arguments.max_rows or max(PROFILE_ROWS, longest) + max_sequences
    return PricedMachine(
        max_sequences=max_sequences,
        kv_token_bytes=profile.kv_token_bytes,
        cost=profile.cost,
        max_rows=max_rows,
        micro_batch_rows=max_rows,
        weight_seconds=0.0,
        description=f"of {profile.model} by {profile.source}",
        devices=profile.devices,
    )
