"""An offloading machine in RAM: real numerics, a hard DEVICE capacity, links of a stated speed.

It makes placement, overlap and out-of-memory testable on any machine, and is public: programs that
embed the engine can test against it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from offload.backend import DeviceBackend, Source, Target, move
from offload.errors import SplitError
from offload.links import Link
from offload.tiers import MemoryAccount, Tier, parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SPEED_NAMES = {
    "host-to-device": Link.HOST_TO_DEVICE,
    "device-to-host": Link.DEVICE_TO_HOST,
    "disk-read": Link.DISK_TO_HOST,
    "disk-write": Link.HOST_TO_DISK,
}


@dataclass(frozen=True, slots=True)
class EmulatedMachine:
    """Capacity of the DEVICE arena in bytes and bytes per second of each link that is limited."""

    capacity: int | None = None
    speeds: Mapping[Link, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> EmulatedMachine:
        """Read `capacity=256MiB,host-to-device=2GB/s,disk-read=1GB/s`. Raises `SplitError`."""
        capacity: int | None = None
        speeds: dict[Link, float] = {}
        for item in text.split(","):
            name, _, value = (part.strip() for part in item.partition("="))
            if name == "capacity":
                capacity = parse_size(value)
            elif name in _SPEED_NAMES and value.endswith("/s") and parse_size(value[:-2]) > 0:
                speeds[_SPEED_NAMES[name]] = parse_size(value[:-2])
            else:
                raise SplitError(
                    f"cannot read {item.strip()!r} in --emulate {text!r}",
                    hint="known: capacity=SIZE, "
                    + ", ".join(f"{known}=SIZE/s" for known in _SPEED_NAMES),
                )
        return cls(capacity, speeds)


class EmulatedBackend(DeviceBackend):
    """Computes on the CPU, with DEVICE as a separate arena behind links of a stated speed."""

    name = "emulated"
    device = torch.device("cpu")
    lazy = (Tier.HOST,)

    def __init__(self, account: MemoryAccount, machine: EmulatedMachine) -> None:
        super().__init__(account)
        self.machine = machine
        self._free_at = dict.fromkeys(Link, 0.0)

    def _allocate(self, tier: Tier, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, link: Link, source: Source, target: Target, after: Sequence[Any]) -> Any:
        """Copy, then hold the link until the bytes would have arrived at its stated speed."""
        start = max(time.monotonic(), self._free_at[link])
        move(source, target)
        speed = self.machine.speeds.get(link)
        if speed is None:
            return None
        nbytes = source.nbytes
        self._free_at[link] = start + nbytes / speed
        time.sleep(max(0.0, self._free_at[link] - time.monotonic()))
        return None
