"""Plans of a model that is not built: from its config, the machine's memory and a batch's size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from compression.selection import PLAIN_BITS
from offload.tiers import Tier
from policy_search.automatic import automatic_policy
from policy_search.bits import choose_bits, combinations
from policy_search.hardware import PACKED_ATTENTION
from policy_search.memory import default_max_rows, default_max_sequences, memory_of
from policy_search.shape_from_config import shape_from_config
from policy_search.throughput import predict as predict_job

if TYPE_CHECKING:
    from collections.abc import Mapping

    from policy_search.bits import BitsChoice
    from policy_search.hardware import Hardware
    from policy_search.memory import TierMemory
    from policy_search.model_config import ModelConfig
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy
    from policy_search.workload import JobLengths


class Plan(NamedTuple):
    """A policy, what it is for, and what it takes."""

    shape: ModelShape
    policy: Policy
    memory: dict[Tier, TierMemory]


@dataclass(frozen=True, kw_only=True, slots=True)
class Planner:
    """All that a plan depends on, but for what is quantized."""

    config: ModelConfig
    dtype: str
    """As requested: see `ModelConfig.types`."""
    limits: Mapping[Tier, int]
    unified: bool
    context: int
    batch: Mapping[str, Any]
    """Fields of `Policy.with_batch`."""

    def plan(self, quantized: Policy) -> Plan:
        """With the bits of `quantized`. Raises `CapacityError` and `PolicyError`."""
        stored, computed = self.config.types(self.dtype, unified=self.unified)
        shape = shape_from_config(self.config, stored, computed, quantized.quantization)
        device = self.limits[Tier.DEVICE]
        base = replace(
            quantized,
            max_rows=default_max_rows(shape, device),
            max_sequences=default_max_sequences(shape, device),
        ).with_batch(**self.batch)
        context, unified = self.context, self.unified
        policy = automatic_policy(shape, self.limits, base, context, unified=unified)
        memory = memory_of(shape, policy, self.limits, context, unified=unified)
        return Plan(shape, policy, memory)

    def choose(
        self,
        quantized: Policy,
        weight_bits: int | None,
        kv_bits: int | None,
        job: JobLengths,
        hardware: Hardware,
    ) -> BitsChoice:
        """The bits for `job`, which fits the context; None: free.

        A checkpoint that comes quantized keeps its own. Raises `CapacityError` if nothing fits.
        """
        if self.config.prequantized is not None and weight_bits is None:
            weight_bits = quantized.weight_bits

        def predict(weights: int, kv: int) -> float:
            plan = self.plan(replace(quantized, weight_bits=weights, kv_bits=kv))
            known = replace(hardware, host_attention=attention_speed(hardware, kv))
            return predict_job(*plan, job, known, unified=self.unified).tokens_per_second

        return choose_bits(combinations(weight_bits, kv_bits), predict)


def attention_speed(hardware: Hardware, kv_bits: int) -> float:
    """Of the processor over pages of these bits, from what is stated for plain ones."""
    part = 1.0 if kv_bits == PLAIN_BITS else PACKED_ATTENTION
    return part * hardware.host_attention
