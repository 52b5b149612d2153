"""What the machine can do, for plans: measured once for each machine, and corrected by runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexrun.skeleton import one_line
from offload.tiers import Tier
from policy_search.calibration_file import load_calibration, machine_key, save_calibration
from policy_search.corrections import Corrections, corrected, model_key
from policy_search.errors import PolicyError
from policy_search.model_profile import ModelProfiles, profile_key
from policy_search.model_speeds import model_speeds

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig

    from offload.backend import DeviceBackend
    from policy_search.calibration_file import MachineKey
    from policy_search.hardware import Hardware
    from policy_search.model_profile import ModelProfile
    from policy_search.model_shape import ModelShape

logger = logging.getLogger(__name__)

SECONDS = 15.0
"""For measuring a machine where a job needs a plan; `policy-search calibrate` takes longer."""
ENOUGH = 1 << 30
"""Bytes of every tier with which a machine is measured for later jobs, too; a model, of DEVICE."""


@dataclass(slots=True)
class PlanningSpeeds:
    """Of one device of this machine, as it computes in one type."""

    dtype: torch.dtype
    backend: DeviceBackend
    directory: Path
    """Of the DISK tier."""
    emulate: str | None = None
    config: PretrainedConfig | None = None
    """Of the model, whose layers are measured, too."""
    _measured: Hardware | None = None
    _used: dict[str, float] = field(default_factory=dict)
    """Factors in the speeds that were given out last."""
    _profiles: dict[str, ModelProfile | None] = field(default_factory=dict)
    """By `profile_key`; None: it cannot be measured."""
    _profiled: bool = False
    """Whether these speeds have the model's profile."""

    @property
    def _key(self) -> MachineKey:
        kind = self.backend.device.type
        if kind == "cpu" and not self.backend.unified:
            kind = "emulated"
        dtype = str(self.dtype).removeprefix("torch.")
        return machine_key(kind, dtype, self.directory, self.emulate)

    def known(self) -> bool:
        """Whether the machine has been measured."""
        if self._measured is None and (found := self._load()) is not None:
            self._measured = found
        return self._measured is not None

    def hardware(self, shape: ModelShape, *, measure_model: bool = True) -> Hardware:
        """For a model of `shape`. The machine is measured now if it never was, and so is the model
        unless `measure_model` is off: products and attention then take what they do in general.

        Raises `CapacityError` and `OffloadStoreError` where the machine cannot be measured.
        """
        if not self.known():
            self._measured = self._measure()
        assert self._measured is not None
        profile = self._profile(shape, measure=measure_model)
        found, self._used = model_speeds(self._measured, self._key.digest, shape, profile)
        self._profiled = found.profile is not None
        return found

    def _profile(self, shape: ModelShape, *, measure: bool) -> ModelProfile | None:
        """Of the model, which is measured once, or found not to be measurable."""
        if self.config is None:
            return None
        key, profiles = profile_key(shape), ModelProfiles()
        if key not in self._profiles and (found := profiles.load(self._key.digest, shape)):
            self._profiles[key] = found
        if key not in self._profiles and measure:
            # Two jobs that measure at once would find half a machine each.
            with profiles.measuring(self._key.digest):
                found = profiles.load(self._key.digest, shape)
                self._profiles[key] = found or self._measure_model(self.config, shape)
        return self._profiles.get(key)

    def _measure_model(self, config: PretrainedConfig, shape: ModelShape) -> ModelProfile | None:
        from flexrun import model_profile  # Numba takes a while to import, too

        seconds = model_profile.SECONDS
        logger.warning("measuring this model's layers, once: about %.0f seconds", seconds)
        where = self.dtype, self.backend, self.directory
        try:
            found = model_profile.measured_profile(config, shape, *where, seconds)
        except Exception as error:  # of model code, or of memory: a job can do without
            logger.warning("they cannot be measured (%s): they are predicted", one_line(error))
            return None
        # What runs for it is on DEVICE.
        if self._for_later_jobs([self.backend.account.limits.get(Tier.DEVICE)]):
            ModelProfiles().store(self._key.digest, shape, found)
        return found

    def _for_later_jobs(self, limits: Iterable[int | None]) -> bool:
        """What is measured under small budgets, of small pieces or of caches, is for one job."""
        return bool(self.emulate) or min(int(limit or 0) for limit in limits) >= ENOUGH

    def _measure(self) -> Hardware:
        """Raises `CapacityError` and `OffloadStoreError`."""
        from flexrun.machine_calibration import measure_machine  # Numba takes a while to import

        logger.warning("measuring this machine, once: %.0f seconds or less", SECONDS)
        machine = measure_machine(self.backend, self.dtype, self.directory, seconds=SECONDS)
        if not self._for_later_jobs(machine.limits.values()):
            return machine.hardware
        try:
            save_calibration(self._key, machine)
        except PolicyError as error:
            logger.warning("%s: the next job measures again", error.message)
        return machine.hardware

    def _load(self) -> Hardware | None:
        try:
            found = load_calibration(self._key)
        except PolicyError as error:
            logger.warning("%s: it is measured again", error.message)
            return None
        return None if found is None else found.hardware

    def learn(
        self, shape: ModelShape, predicted: Mapping[str, float], measured: Mapping[str, float]
    ) -> None:
        """A run is over: seconds of each resource, as `predicted` with `hardware` and as they were.

        What is wrong is corrected in the next plan: see `corrected`.
        """
        factors = corrected(self._used, predicted, measured)
        key = model_key(shape, profiled=self._profiled)
        Corrections().store(self._key.digest, key, factors)
