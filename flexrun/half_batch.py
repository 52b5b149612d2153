"""What an engine goes on with when the device had no memory for a sweep."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from policy_search.memory import workspace
from policy_search.policy import with_half_the_rows

if TYPE_CHECKING:
    from flexrun.config import EngineConfig
    from flexrun.runtime import Runtime


def with_half_the_batch(config: EngineConfig, runtime: Runtime, shortage: str) -> EngineConfig:
    """`config` with the policy of `runtime` and half its rows. Raises `CapacityError`.

    What that frees stays free: else KV pages would take it, and the device would be as full.
    """
    policy, shape = with_half_the_rows(runtime.policy, shortage), runtime.shape
    freed = workspace(shape, runtime.policy) - workspace(shape, policy)
    if config.device_memory is not None:  # else what is free is found out again
        config = replace(config, device_memory=config.device_memory - freed)
    return config.with_policy(policy)
