"""What earlier runs found wrong in predictions: factors for each resource of a sweep."""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from policy_search.model_profile import FORMAT
from policy_search.model_records import ModelRecords
from policy_search.model_shape import ModelShape
from policy_search.sweep_load import RESOURCES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

REMEMBERED = 5
"""Runs. One says as much of what others did on the machine meanwhile as of the machine; what
changes for good has changed the median of five after three."""
_Factors = dict[str, list[float]]
"""By resource, of the last runs, the oldest first."""
LEAST, MOST = 0.1, 10.0
"""Of a factor: what is farther off is no matter of speeds."""


def model_key(shape: ModelShape, *, profiled: bool = False) -> str:
    """The same for models that take the same time, whatever their tensors are called, and whether
    they were prepared before.

    Predictions with the model's profile are wrong in other ways than those without.
    """
    others = ("tensors", "prepared_bytes")
    names = [field.name for field in fields(ModelShape) if field.name not in others]
    values = {name: getattr(shape, name) for name in names}
    values["profiled"] = FORMAT if profiled else False
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def corrected(
    used: Mapping[str, float], predicted: Mapping[str, float], measured: Mapping[str, float]
) -> dict[str, float]:
    """By what each resource's plain seconds are multiplied to be what a run `measured`.

    `used`: the factors that are in the `predicted` seconds. Both others are seconds, by resource;
    one that was not measured or not predicted has no factor.
    """
    return {
        name: min(MOST, max(LEAST, used.get(name, 1.0) * measured[name] / seconds))
        for name, seconds in predicted.items()
        if seconds > 0 and measured.get(name, 0.0) > 0
    }


class Corrections:
    """The factors by which predicted seconds are multiplied, by machine and model."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory`: of their files, one for each machine; None: in the user's cache."""
        self._records = ModelRecords("corrections", _usable, directory)

    def load(self, machine_key: str, model_key: str) -> dict[str, float]:
        """Factors by resource, the medians of the last runs; one that is not there needs none."""
        found: dict[str, list[float]] = self._records.load(machine_key, model_key) or {}
        return {name: statistics.median(factors) for name, factors in found.items()}

    def store(self, machine_key: str, model_key: str, factors: Mapping[str, float]) -> None:
        """Remember one run's `factors` beside those of the runs before it.

        Says in a warning if it cannot.
        """
        if factors:
            new = _usable({name: [factor] for name, factor in factors.items()})
            self._records.store(machine_key, model_key, lambda known: _joined(known or {}, new))


def _joined(known: _Factors, new: _Factors) -> _Factors:
    """The last of both; resources with nothing `new` keep what is `known`."""
    return known | {
        name: [*known.get(name, []), *factors][-REMEMBERED:] for name, factors in new.items()
    }


def _usable(factors: Mapping[str, Any]) -> _Factors:
    """Of resources that there are. Raises `TypeError` and `ValueError` for what are no factors."""
    if not all(isinstance(each, list) for each in factors.values()):
        raise TypeError("factors must be in lists")
    known = {name: list(map(float, each)) for name, each in factors.items() if name in RESOURCES}
    if any(not each or not all(LEAST <= one <= MOST for one in each) for each in known.values()):
        raise ValueError(f"factors must be from {LEAST:g} to {MOST:g}")
    return known
