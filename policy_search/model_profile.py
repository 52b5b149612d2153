"""What one model's layers were measured to take on one machine (no torch)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from policy_search.model_records import ModelRecords

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from policy_search.model_shape import ModelShape

Points = tuple[tuple[int, float], ...]
"""Rows, rising, and seconds."""
FORMAT = 4
"""Raise it when something else is measured: what was measured before is not used then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelProfile:
    """Seconds of the operators that depend on the model; its products are among them."""

    layers: Points
    """Rows of a micro-batch, and all layers with them, attention to earlier positions apart."""
    in_place: Points = ()
    """The same with weights that stay where they are computed with, in the order that suits the
    processor; empty: as `layers`."""
    head: Points = ()
    """Rows that need logits, and the output head; empty: as other products."""
    head_in_place: Points = ()
    """The same with a head that stays, as `in_place`; empty: as `head`."""
    program: float = 0.0
    """Seconds of a micro-batch's way through all layers in which the device waits for the program
    that tells it what to do, …"""
    around: float = 0.0
    """… and of a sweep before and after that, with the choice of tokens."""
    device_attention: float = math.inf
    """Bytes per second of keys and values that single rows attend to."""
    attention_flops: float = math.inf
    """Operations per second of prompts' rows that attend."""
    compute_lost: float = 0.0
    """Part of their speed that layers lose while weights arrive, …"""
    link_lost: float = 0.0
    """… and their link while the layers compute."""

    def layer_seconds(self, rows: float, in_place: float, least: float = 0.0) -> float:
        """Of a micro-batch; a part `in_place` of the weights stays. `least`: see `seconds_at`."""
        return _between(self.layers, self.in_place, rows, in_place, least)

    def head_seconds(self, rows: float, in_place: float, least: float = 0.0) -> float:
        """Of a micro-batch; a part `in_place` of the head stays. There are points of it."""
        return _between(self.head, self.head_in_place, rows, in_place, least)

    def slowed(self, factor: float) -> ModelProfile:
        """All of it takes `factor` times as long."""
        layers, in_place, head, head_in_place = (
            tuple((rows, factor * seconds) for rows, seconds in points)
            for points in (self.layers, self.in_place, self.head, self.head_in_place)
        )
        return replace(
            self,
            layers=layers,
            in_place=in_place,
            head=head,
            head_in_place=head_in_place,
            device_attention=self.device_attention / factor,
            attention_flops=self.attention_flops / factor,
        )


def _between(points: Points, in_place: Points, rows: float, part: float, least: float) -> float:
    plain = seconds_at(points, rows, least)
    if not (in_place and part):
        return plain
    # `least` is of plain products.
    faster = seconds_at(in_place, rows, least * in_place[-1][1] / points[-1][1])
    return plain + part * (faster - plain)


def seconds_at(points: Sequence[tuple[int, float]], rows: float, least: float = 0.0) -> float:
    """Linear between `points` and beyond the last two; constant below the first.

    Beyond the last one each row takes at least so many seconds more: two points may be alike by
    chance, or because both sizes wait for the same weights.
    """
    first, last = points[0], points[-1]
    if len(points) == 1 or rows <= first[0]:
        return first[1] * max(1.0, rows / first[0])
    pairs = list(pairwise(points))
    (less, fast), (more, slow) = next((pair for pair in pairs if rows <= pair[1][0]), pairs[-1])
    seconds = fast + (slow - fast) * (rows - less) / (more - less)
    return max(seconds, last[1] + (rows - last[0]) * least) if rows > last[0] else seconds


@cache
def _version(package: str) -> str:
    """As it says without being imported; empty if it is not there."""
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return ""


def profile_key(shape: ModelShape) -> str:
    """The same for models that compute the same with the same libraries, in however many bits their
    tensors are stored.
    """
    values = (
        FORMAT,
        *map(_version, ("torch", "transformers")),
        shape.architecture,
        any(tensor.unit < 0 for tensor in shape.tensors),  # a head that is no table can be packed
        shape.hidden_size,
        shape.widest,
        shape.vocab_size,
        shape.value_bytes,
        shape.kv_rows,
        shape.query_values,
        shape.output_values,
        shape.flops_per_row,
        shape.head_flops_per_row,
        (shape.experts, shape.experts_per_row, shape.expert_values),
    )
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


class ModelProfiles:
    """Of all models that were measured, by machine and model."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory`: of their files, one for each machine; None: in the user's cache."""
        self._records = ModelRecords("profiles", _read, directory)

    def load(self, machine_key: str, shape: ModelShape) -> ModelProfile | None:
        """None if it was never measured."""
        found: ModelProfile | None = self._records.load(machine_key, profile_key(shape))
        return found

    def measuring(self, machine_key: str) -> AbstractContextManager[None]:
        """While no other process measures a model on the machine."""
        return self._records.measuring(machine_key)

    def store(self, machine_key: str, shape: ModelShape, profile: ModelProfile) -> None:
        """Keep it for later plans. Says in a warning if it cannot."""
        data = {k: v for k, v in asdict(profile).items() if v != math.inf}
        self._records.store(machine_key, profile_key(shape), lambda _: data)


def _read(data: Any) -> ModelProfile:
    """Raises `TypeError`, `ValueError` and `KeyError` for what is no profile."""
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name in ("layers", "in_place", "head", "head_in_place"):
            values[name] = _points(value, may_be_empty=name != "layers")
        else:
            values[name] = float(value)
            least_is_zero = name not in ("device_attention", "attention_flops")
            most = 1.0 if name.endswith("_lost") else math.inf
            if not 0 <= values[name] < most or not (values[name] or least_is_zero):
                raise ValueError(f"{name} must not be {value}")
    return ModelProfile(**values)


def _points(value: Any, *, may_be_empty: bool) -> Points:
    points = tuple((int(rows), float(seconds)) for rows, seconds in value)
    rising = all(one[0] < other[0] for one, other in pairwise(points))
    usable = all(rows >= 1 and 0 < seconds < math.inf for rows, seconds in points)
    if not (rising and usable and (points or may_be_empty)):
        raise ValueError("rows must rise, and seconds be above 0")
    return points
