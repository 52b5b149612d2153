"""The plan of a model that is built: what its weights take, and the policy they are placed by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from flexrun.disk_weights import plan_disk
from flexrun.loading import model_shape
from flexrun.model_weights import find_weights
from offload.tiers import Tier
from policy_search.automatic import automatic_policy, with_depth
from policy_search.memory import default_max_rows, default_max_sequences
from policy_search.policy import Policy

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from flexrun.config import EngineConfig
    from flexrun.disk_weights import DiskPlan
    from flexrun.model import Model
    from flexrun.model_weights import ModelWeights
    from offload.backend import DeviceBackend
    from offload.checkpoint import Checkpoint
    from policy_search.model_shape import ModelShape


class ModelPlan(NamedTuple):
    """What a configuration makes of a model."""

    weights: ModelWeights
    disk: DiskPlan
    shape: ModelShape
    policy: Policy


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

    def plan(self, config: EngineConfig) -> ModelPlan:
        """Under the policy of `config`, or the automatic one. Raises `CapacityError`."""
        weights = find_weights(self.model, config.quantization, self.checkpoint.packed)
        disk = plan_disk(self.checkpoint, weights.units, self.directory)
        shape = model_shape(self.model, weights, self.dtype, disk, config.quantization)
        return ModelPlan(weights, disk, shape, self._policy(config, shape))

    @property
    def limits(self) -> dict[Tier, int]:
        """Bytes of every tier."""
        limits = self.backend.account.limits
        return {tier: int(limits.get(tier) or 0) for tier in Tier}

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
        context, unified = self.model.context_length, self.backend.unified
        if config.policy is None and not {"weights", "kv_cache"} <= changed.keys():
            kv_cache = changed.get("kv_cache")
            policy = automatic_policy(
                shape, limits, policy, context, unified=unified, kv_cache=kv_cache
            )
        return with_depth(shape, replace(policy, **changed), limits, context, unified=unified)
