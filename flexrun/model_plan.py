"""The plan of a model that is built: what its weights take, and the policy they are placed by."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from flexrun.disk_weights import plan_disk
from flexrun.loading import model_shape
from flexrun.model_weights import find_weights
from flexrun.rehearsal import quickest
from flexrun.skeleton import one_line
from offload.errors import CapacityError, OffloadStoreError
from offload.tiers import Split, Tier
from policy_search.automatic import automatic_policy, with_depth
from policy_search.goal import Goal
from policy_search.memory import default_max_rows, default_max_sequences, longest_held, memory_of
from policy_search.planner import for_kv_bits
from policy_search.policy import Policy
from policy_search.search import Search
from policy_search.sweep_cost import SweepCost
from policy_search.throughput import predict
from policy_search.workload import JobLengths, Workload

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from flexrun.config import EngineConfig
    from flexrun.disk_weights import DiskPlan
    from flexrun.model import Model
    from flexrun.model_weights import ModelWeights
    from flexrun.planning_speeds import PlanningSpeeds
    from offload.backend import DeviceBackend
    from offload.checkpoint import Checkpoint
    from policy_search.hardware import Hardware
    from policy_search.model_shape import ModelShape
    from policy_search.throughput import Prediction

logger = logging.getLogger(__name__)


class ModelPlan(NamedTuple):
    """What a configuration makes of a model."""

    weights: ModelWeights
    disk: DiskPlan
    shape: ModelShape
    policy: Policy
    job: JobLengths
    """What is planned for."""
    room_for: int
    """Tokens of the longest sequence there is room for, if the job has so long ones."""
    prediction: Prediction | None
    """Of that job; None where speeds were not needed, and never measured. The next one likewise."""
    cost: SweepCost | None
    """What prices sweeps."""


@dataclass(frozen=True, slots=True)
class ModelPlanner:
    """A model and the machine that it is planned for."""

    model: Model
    checkpoint: Checkpoint
    dtype: torch.dtype
    """That is computed in."""
    backend: DeviceBackend
    directory: Path
    """Of the DISK tier."""
    speeds: PlanningSpeeds

    def plan(self, config: EngineConfig) -> ModelPlan:
        """Under the policy of `config`, or one that is searched for. Raises `CapacityError`."""
        weights = find_weights(self.model, config.quantization, self.checkpoint.packed)
        disk = plan_disk(self.checkpoint, weights.units, self.directory)
        shape = model_shape(self.model, weights, self.dtype, disk, config.quantization)
        policy = self._policy(config, shape)
        memory = memory_of(shape, policy, self.limits, self.context, unified=self.unified)
        job, prediction, cost = self._job(config), None, None
        if config.allow_quantization or self.speeds.known():
            # A job that needed no plan is foreseen as well as it can be without measuring.
            speeds = self._hardware(shape, policy, measure_model=config.allow_quantization)
            unified = {"unified": self.unified}
            prediction = predict(shape, policy, memory, job, speeds, **unified)
            cost = SweepCost(shape, policy, memory, speeds, **unified)
        room_for = min(self.context, job.longest_sequence, longest_held(shape, policy, memory))
        return ModelPlan(weights, disk, shape, policy, job, room_for, prediction, cost)

    @property
    def limits(self) -> dict[Tier, int]:
        """Bytes of every tier."""
        limits = self.backend.account.limits
        return {tier: int(limits.get(tier) or 0) for tier in Tier}

    @property
    def context(self) -> int:
        """Most positions of a sequence."""
        return self.model.context_length

    @property
    def unified(self) -> bool:
        return self.backend.unified

    def _job(self, config: EngineConfig) -> JobLengths:
        """What is planned for, as far as it fits the model; if nothing is said, conversations."""
        job = config.job_lengths or Workload().job()
        return job.within(self.context)

    def _policy(self, config: EngineConfig, shape: ModelShape) -> Policy:
        changed, limits = config.overrides, self.limits
        policy = config.policy or Policy()
        batch = {f: v for f, v in changed.items() if f not in ("weights", "kv_cache")}
        if config.policy is None:
            policy = Policy(
                max_rows=default_max_rows(shape, limits[Tier.DEVICE]),
                max_sequences=default_max_sequences(shape, limits[Tier.DEVICE]),
            ).with_batch(**batch)
        policy = replace(policy, **batch, overlap=policy.overlap and config.overlap)
        if config.policy is None and not {"weights", "kv_cache"} <= changed.keys():
            policy = self._planned(shape, policy, config)
        policy = replace(policy, **changed)
        return with_depth(shape, policy, limits, self.context, unified=self.unified)

    def _planned(self, shape: ModelShape, base: Policy, config: EngineConfig) -> Policy:
        """By the machine's speeds, unless everything fits. Raises `CapacityError`."""
        changed, shortage = config.overrides, None
        known = shape, self.limits, base, self.context
        try:
            kv_cache = changed.get("kv_cache")
            found = automatic_policy(*known, unified=self.unified, kv_cache=kv_cache)
            if self._suffices(shape, found, config):
                return found
        except CapacityError as error:
            shortage = error
        try:
            return self._searched(shape, replace(base, **changed), config)
        except (CapacityError, OffloadStoreError, RuntimeError) as error:
            if shortage is not None:
                # The search has tried fewer rows: less is missing.
                raise (error if isinstance(error, CapacityError) else shortage) from None
            # A device that cannot be measured can still run the job.
            logger.warning("the plan knows no speeds: %s", error)
            return found

    def _suffices(self, shape: ModelShape, policy: Policy, config: EngineConfig) -> bool:
        """Whether all is on DEVICE that the job wants there: nothing can be better."""
        here = Split(device=100)
        if (policy.weights, policy.kv_cache) != (here, here):
            return False
        memory = memory_of(shape, policy, self.limits, self.context, unified=self.unified)
        job = self._job(config)
        running = min(policy.max_sequences, job.sequences)
        wanted = running * (job.prompt + job.output + policy.page_tokens)
        wanted = max(wanted, min(self.context, job.longest_sequence))
        return memory[Tier.DEVICE].kv >= wanted * shape.kv_token_bytes

    def _searched(self, shape: ModelShape, base: Policy, config: EngineConfig) -> Policy:
        search = Search(
            shape=shape,
            limits=self.limits,
            base=base,
            context=self.context,
            unified=self.unified,
            job=self._job(config),
            hardware=self._hardware(shape, base),
            given=config.overrides.keys(),
        )
        goal, candidates = Goal(), search.run()
        try:
            found = quickest(search, goal.eligible(candidates))
        except Exception as error:  # a job can do without a rehearsal
            logger.warning("plans cannot be rehearsed: %s", one_line(error))
            found = None
        return (found or goal.best(candidates)).policy

    def _hardware(
        self, shape: ModelShape, policy: Policy, *, measure_model: bool = True
    ) -> Hardware:
        """For pages of as few bits as the policy's."""
        found = self.speeds.hardware(shape, measure_model=measure_model)
        return for_kv_bits(found, policy.kv_bits, unified=self.unified)
