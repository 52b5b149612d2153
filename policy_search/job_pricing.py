"""What a policy takes of a machine, and is predicted to do with a job (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from offload.errors import CapacityError
from policy_search.automatic import with_depth
from policy_search.memory import memory_of
from policy_search.throughput import Prediction, predict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload.tiers import Tier
    from policy_search.hardware import Hardware
    from policy_search.memory import TierMemory
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy
    from policy_search.workload import JobLengths


class Candidate(NamedTuple):
    """A policy that fits, and what it is predicted to do."""

    policy: Policy
    memory: dict[Tier, TierMemory]
    prediction: Prediction


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPricing:
    """A model, a machine and a job, by which policies are priced."""

    shape: ModelShape
    limits: Mapping[Tier, int]
    context: int
    """Most tokens of a sequence."""
    unified: bool
    job: JobLengths
    hardware: Hardware

    def price(self, policy: Policy) -> Candidate | CapacityError:
        """What `policy` takes and is predicted to do, or what it is short of."""
        known = self.shape, policy, self.limits, self.context
        try:
            deep = with_depth(*known, unified=self.unified)
            memory = memory_of(self.shape, deep, self.limits, self.context, unified=self.unified)
        except CapacityError as error:
            return error
        return Candidate(deep, memory, self.predicted(deep, memory))

    def predicted(self, policy: Policy, memory: Mapping[Tier, TierMemory]) -> Prediction:
        """What `policy` does if it takes so much memory."""
        known = self.job, self.hardware
        return predict(self.shape, policy, memory, *known, unified=self.unified)
