"""What earlier runs found wrong in predictions: a factor for each resource of a sweep.

It is only a cache: one that cannot be read or written costs a worse plan, and no job.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from policy_search.machine import cache_dir
from policy_search.model_shape import ModelShape
from policy_search.sweep_load import RESOURCES
from policy_search.whole_file import locked, write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

WRONG = 0.15
"""Part of the predicted seconds that a run may differ by without being remembered."""
LEAST, MOST = 0.1, 10.0
"""Of a factor: what is farther off is no matter of speeds."""
MOST_MODELS = 64
"""Of a machine; those that ran longest ago are forgotten."""


def model_key(shape: ModelShape) -> str:
    """The same for models that take the same time, whatever their tensors are called."""
    names = [field.name for field in fields(ModelShape) if field.name != "tensors"]
    text = json.dumps({name: getattr(shape, name) for name in names}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def corrected(
    used: Mapping[str, float], predicted: Mapping[str, float], measured: Mapping[str, float]
) -> dict[str, float]:
    """Factors for the next plan, of resources that were `predicted` more than `WRONG` off.

    `used`: the factors that are in these predictions. Both others are seconds, by resource.
    """
    ratios = {
        name: measured[name] / seconds
        for name, seconds in predicted.items()
        if seconds > 0 and measured.get(name, 0.0) > 0
    }
    return {
        name: min(MOST, max(LEAST, used.get(name, 1.0) * ratio))
        for name, ratio in ratios.items()
        if abs(ratio - 1) > WRONG
    }


class Corrections:
    """The factors by which predicted seconds are multiplied, by machine and model."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory`: of their files, one for each machine; None: in the user's cache."""
        self._directory = directory or cache_dir() / "corrections"

    def load(self, machine_key: str, model_key: str) -> dict[str, float]:
        """Factors by resource; a resource that is not in them needs none."""
        return self._models(machine_key).get(model_key, {})

    def store(self, machine_key: str, model_key: str, factors: Mapping[str, float]) -> None:
        """Remember `factors` beside those of other resources. Says in a warning if it cannot."""
        if not factors:
            return
        path = self._path(machine_key)
        try:
            with locked(path.with_suffix(".lock")):
                models = self._models(machine_key)
                known = models.pop(model_key, {})
                models[model_key] = known | _usable(factors)  # the newest is the last
                kept = dict(list(models.items())[-MOST_MODELS:])
                write_whole(path, json.dumps({"models": kept}, indent=2) + "\n")
        except OSError as error:
            logger.warning("%s cannot be written (%s): the next plan is no better", path, error)

    def _path(self, machine_key: str) -> Path:
        return self._directory / f"{machine_key}.json"

    def _models(self, machine_key: str) -> dict[str, dict[str, float]]:
        """By model key, the one that ran longest ago first."""
        path = self._path(machine_key)
        try:
            models = json.loads(path.read_text(encoding="utf-8"))["models"]
            return {model: _usable(factors) for model, factors in models.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning(
                "%s is only a cache and cannot be read (%r): it is ignored, and replaced after the "
                "next run",
                path,
                error,
            )
            return {}


def _usable(factors: Mapping[str, Any]) -> dict[str, float]:
    """Of resources that there are. Raises `TypeError` and `ValueError` for what is no factor."""
    known = {name: float(factor) for name, factor in factors.items() if name in RESOURCES}
    if any(not LEAST <= factor <= MOST for factor in known.values()):
        raise ValueError(f"factors must be from {LEAST:g} to {MOST:g}")
    return known
