"""Plans of a model that is not built: from its config, a machine and a job."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from compression.selection import PLAIN_BITS
from offload.tiers import Tier
from policy_search.bits import BitsRate, choose_bits, combinations
from policy_search.goal import Goal
from policy_search.hardware import PACKED_ATTENTION
from policy_search.memory import default_max_rows, default_max_sequences, longest_held
from policy_search.model_speeds import model_speeds
from policy_search.search import Search
from policy_search.shape_from_config import shape_from_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from policy_search.bits import BitsChoice
    from policy_search.hardware import Hardware
    from policy_search.job_pricing import Candidate
    from policy_search.memory import TierMemory
    from policy_search.model_config import ModelConfig
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy
    from policy_search.throughput import Prediction
    from policy_search.workload import JobLengths


class Plan(NamedTuple):
    """A policy, what it takes and does, and the search that has found it."""

    search: Search
    candidates: list[Candidate]
    best: Candidate

    @property
    def shape(self) -> ModelShape:
        return self.search.shape

    @property
    def policy(self) -> Policy:
        return self.best.policy

    @property
    def memory(self) -> dict[Tier, TierMemory]:
        return self.best.memory

    @property
    def prediction(self) -> Prediction:
        return self.best.prediction

    @property
    def room_for(self) -> int:
        """Tokens of the longest sequence there is room for, if the job has so long ones."""
        return min(self.search.needed_tokens, longest_held(self.shape, self.policy, self.memory))


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
    """Fields of `Policy.with_batch`; None: to be found."""
    job: JobLengths
    """That fits the context."""
    hardware: Hardware
    machine_key: str = ""
    """Of a machine whose runs have corrected its speeds."""
    goal: Goal = field(default_factory=Goal)

    def plan(self, quantized: Policy) -> Plan:
        """With the bits of `quantized`. Raises `CapacityError` and `PolicyError`."""
        search = self._search(quantized)
        candidates = search.run()
        return Plan(search, candidates, self.goal.best(candidates))

    def _search(self, quantized: Policy) -> Search:
        stored, computed = self.config.types(self.dtype, unified=self.unified)
        shape = _known(shape_from_config(self.config, stored, computed, quantized.quantization))
        device = self.limits[Tier.DEVICE]
        base = replace(
            quantized,
            max_rows=default_max_rows(shape, device),
            max_sequences=default_max_sequences(shape, device),
        ).with_batch(**self.batch)
        speeds = self.hardware
        if self.machine_key:
            speeds, _ = model_speeds(speeds, self.machine_key, shape)
        return Search(
            shape=shape,
            limits=self.limits,
            base=base,
            context=self.context,
            unified=self.unified,
            job=self.job,
            hardware=for_kv_bits(speeds, quantized.kv_bits, unified=self.unified),
            given=[name for name, value in self.batch.items() if value is not None],
        )

    def choose(
        self, quantized: Policy, weight_bits: int | None, kv_bits: int | None
    ) -> tuple[BitsChoice, Plan]:
        """The bits for the job, and the plan with them; None: free.

        A checkpoint that comes quantized keeps its own. Raises `CapacityError` if nothing fits.
        """
        if self.config.prequantized is not None and weight_bits is None:
            weight_bits = quantized.weight_bits
        plans: dict[tuple[int, int], Plan] = {}

        def predict(weights: int, kv: int) -> BitsRate:
            plan = self.plan(replace(quantized, weight_bits=weights, kv_bits=kv))
            plans[weights, kv] = plan
            return BitsRate(plan.prediction.tokens_per_second, plan.room_for)

        found = choose_bits(combinations(weight_bits, kv_bits), predict)
        return found, plans[found.chosen.weight_bits, found.chosen.kv_bits]


@lru_cache(maxsize=16)
def _known(shape: ModelShape) -> ModelShape:
    """The equal one of an earlier plan: what is remembered of it is found without comparing all."""
    return shape


def for_kv_bits(hardware: Hardware, kv_bits: int, *, unified: bool) -> Hardware:
    """`hardware` with pages of these bits, from what is known for plain ones."""
    if kv_bits == PLAIN_BITS:
        return hardware
    device = PACKED_ATTENTION if unified else 1.0  # GPUs read them as fast as others
    return replace(
        hardware,
        host_attention=PACKED_ATTENTION * hardware.host_attention,
        device_attention=device * hardware.device_attention,
    )
