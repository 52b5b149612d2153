"""A machine to plan for: its memories and what it can do, as a preset, a file, or measured."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from offload.tiers import Tier
from policy_search.errors import PolicyError
from policy_search.hardware import Hardware

if TYPE_CHECKING:
    from pathlib import Path

MEMORIES = {
    "device_memory": Tier.DEVICE,
    "host_memory": Tier.HOST,
    "disk_space": Tier.DISK,
}
"""What the limits of each tier are called."""
_SPEEDS = tuple(field.name for field in fields(Hardware) if field.name != "profile")
_SHARES = ("contention", "compute_lost", "link_lost", "hosted_call")
"""Speeds that are no speeds, but a part of 1, or of a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineSpec:
    """Capacities in bytes and speeds of a machine."""

    name: str
    limits: dict[Tier, int]
    """Bytes of each tier that a job may take."""
    hardware: Hardware
    unified: bool = False
    """HOST is the memory of the device: a CPU computes."""
    source: str = ""
    """Where the figures are from, in words."""
    key: str = ""
    """Under which corrections of plans for this machine are kept; empty: there are none."""

    def to_json(self) -> str:
        """One JSON object; speeds without a limit are left out."""
        speeds = {name: getattr(self.hardware, name) for name in _SPEEDS}
        speeds["products"] = [list(point) for point in self.hardware.products]
        known = {name: value for name, value in speeds.items() if value not in (math.inf, [])}
        memories = {name: self.limits[tier] for name, tier in MEMORIES.items()}
        plain = {"name": self.name, "source": self.source, "unified": self.unified}
        return json.dumps({**plain, **memories, "speeds": known}, indent=2)

    @classmethod
    def from_json(cls, text: str, where: str) -> MachineSpec:
        """Read `to_json`'s format; `where` says what is read in errors. Raises `PolicyError`."""
        hint = f"correct it, or measure the machine anew (`policy-search calibrate -o {where}`)"
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PolicyError(f"{where} is not JSON: {error}", hint=hint) from None
        if not isinstance(data, dict):
            raise PolicyError(f"{where} is not a JSON object", hint=hint)
        try:
            return cls._read(data)
        except PolicyError as error:
            raise PolicyError(f"{where}: {error.message}", error.hint or hint) from None

    @classmethod
    def _read(cls, data: dict[str, Any]) -> MachineSpec:
        known = {"name", "source", "unified", "speeds", *MEMORIES}
        if unknown := sorted(data.keys() - known):
            raise PolicyError(
                f"unknown field {unknown[0]!r}", hint=f"known: {', '.join(sorted(known))}"
            )
        if missing := sorted({"speeds", *MEMORIES} - data.keys()):
            raise PolicyError(f"there is no {missing[0]}")
        unified = data.get("unified", False)
        if not isinstance(unified, bool):
            raise PolicyError(f"unified must be true or false, not {unified!r}")
        limits = {tier: whole_bytes(name, data[name]) for name, tier in MEMORIES.items()}
        return cls(
            name=str(data.get("name", "")),
            limits=limits,
            hardware=read_speeds(data["speeds"]),
            unified=unified,
            source=str(data.get("source", "")),
        )

    @classmethod
    def load(cls, path: Path) -> MachineSpec:
        """Read a file. Raises `PolicyError`."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            hint = "give a file that `policy-search calibrate -o FILE` wrote, or a machine by name"
            raise PolicyError(f"cannot read the machine {path}: {error}", hint=hint) from None


def read_speeds(data: Any) -> Hardware:
    """The fields of `Hardware` from JSON. Raises `PolicyError`."""
    if not isinstance(data, dict):
        raise PolicyError("speeds must be an object of bytes or operations per second")
    if unknown := sorted(data.keys() - set(_SPEEDS)):
        raise PolicyError(
            f"unknown speed {unknown[0]!r}", hint=f"known: {', '.join(sorted(_SPEEDS))}"
        )
    values: dict[str, Any] = {name: _speed(name, value) for name, value in data.items()}
    values.setdefault("host_to_device", math.inf)
    return Hardware(**values)


def _speed(name: str, value: Any) -> Any:
    if name == "products":
        return _points(value)
    least_is_zero = name in _SHARES
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 <= value < 1 if least_is_zero else 0 < value < math.inf):
        wanted = "from 0 to below 1" if least_is_zero else "above 0"
        raise PolicyError(f"the speed {name} must be a number {wanted}, not {value!r}")
    return float(value)


def _points(value: Any) -> tuple[tuple[int, float], ...]:
    try:
        points = tuple((int(rows), float(speed)) for rows, speed in value)
    except (TypeError, ValueError):
        raise PolicyError("products must be a list of pairs: rows, operations per second") from None
    rising = all(one[0] < other[0] for one, other in pairwise(points))
    if not rising or any(rows < 1 or not 0 < speed < math.inf for rows, speed in points):
        raise PolicyError("products must have rising rows and speeds above 0")
    return points


def whole_bytes(name: str, value: Any) -> int:
    """The size that is called `name`. Raises `PolicyError`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PolicyError(f"{name} must be a whole number of bytes, not {value!r}")
    return value
