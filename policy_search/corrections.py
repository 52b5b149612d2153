"""What earlier runs found wrong in predictions: a factor for each resource of a sweep."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from policy_search.model_records import ModelRecords
from policy_search.model_shape import ModelShape
from policy_search.sweep_load import RESOURCES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

WRONG = 0.15
"""Part of the predicted seconds that runs differ by anyway."""
LEAST, MOST = 0.1, 10.0
"""Of a factor: what is farther off is no matter of speeds."""


def model_key(shape: ModelShape, *, profiled: bool = False) -> str:
    """The same for models that take the same time, whatever their tensors are called.

    Predictions with the model's profile are wrong in other ways than those without.
    """
    names = [field.name for field in fields(ModelShape) if field.name != "tensors"]
    values = {name: getattr(shape, name) for name in names} | {"profiled": profiled}
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def corrected(
    used: Mapping[str, float], predicted: Mapping[str, float], measured: Mapping[str, float]
) -> dict[str, float]:
    """Factors for the next plan, of resources that were `predicted` wrong.

    Where that is by more than `WRONG`, what was measured counts, else what is halfway there: runs
    differ by as much. `used`: the factors that are in these predictions. Both others are seconds,
    by resource.
    """
    ratios = {
        name: measured[name] / seconds
        for name, seconds in predicted.items()
        if seconds > 0 and measured.get(name, 0.0) > 0
    }
    found = {
        name: used.get(name, 1.0) * (ratio if abs(ratio - 1) > WRONG else math.sqrt(ratio))
        for name, ratio in ratios.items()
    }
    return {name: min(MOST, max(LEAST, factor)) for name, factor in found.items()}


class Corrections:
    """The factors by which predicted seconds are multiplied, by machine and model."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory`: of their files, one for each machine; None: in the user's cache."""
        self._records = ModelRecords("corrections", _usable, directory)

    def load(self, machine_key: str, model_key: str) -> dict[str, float]:
        """Factors by resource; a resource that is not in them needs none."""
        return self._records.load(machine_key, model_key) or {}

    def store(self, machine_key: str, model_key: str, factors: Mapping[str, float]) -> None:
        """Remember `factors` beside those of other resources. Says in a warning if it cannot."""
        if factors:
            usable = _usable(factors)
            self._records.store(machine_key, model_key, lambda known: (known or {}) | usable)


def _usable(factors: Mapping[str, Any]) -> dict[str, float]:
    """Of resources that there are. Raises `TypeError` and `ValueError` for what is no factor."""
    known = {name: float(factor) for name, factor in factors.items() if name in RESOURCES}
    if any(not LEAST <= factor <= MOST for factor in known.values()):
        raise ValueError(f"factors must be from {LEAST:g} to {MOST:g}")
    return known
