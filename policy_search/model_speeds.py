"""What is known of a model on a machine: its profile, and what runs have corrected (no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from policy_search.corrections import Corrections, model_key
from policy_search.hardware import with_factors
from policy_search.model_profile import ModelProfiles

if TYPE_CHECKING:
    from policy_search.hardware import Hardware
    from policy_search.model_profile import ModelProfile
    from policy_search.model_shape import ModelShape


def model_speeds(
    machine: Hardware, machine_key: str, shape: ModelShape, profile: ModelProfile | None = None
) -> tuple[Hardware, dict[str, float]]:
    """The speeds of `machine` for the model of `shape`, and the factors that are in them.

    `profile`: the model's; None: the one that was kept, if any.
    """
    profile = profile or ModelProfiles().load(machine_key, shape)
    hardware = machine if profile is None else machine.profiled(profile)
    key = model_key(shape, profiled=profile is not None)
    factors = Corrections().load(machine_key, key)
    return with_factors(hardware, factors), factors
