"""An offloading machine in RAM: real numerics, a hard DEVICE capacity, links of a stated speed.

It makes placement, overlap and out-of-memory testable on any machine, and is public: programs that
embed the engine can test against it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from offload.backend import DeviceBackend, Source, Target, move
from offload.errors import SplitError
from offload.links import Link, ScatteredRows, TensorRows
from offload.ram import map_memory
from offload.tiers import DISK_BLOCK, REQUEST_BYTES, MemoryAccount, Tier, padded, parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REQUEST_SECONDS = 0.005
"""Of one request on an emulated link."""
SHORTEST_SLEEP = 100e-6
"""The system wakes a thread up later by about so much, and each time takes a core from others."""
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


class _Pace:
    """When bytes arrive that are sent over one link: they follow each other."""

    def __init__(self) -> None:
        self._free_at = 0.0
        self._owed = 0.0
        """Seconds of copies that were too short to sleep for: the next one has to wait for them."""
        self._lock = threading.Lock()

    def send(self, seconds: float) -> float:
        """When bytes that are sent now, and take so long, will be through."""
        with self._lock:
            start = max(time.monotonic(), self._free_at)
            self._free_at = start + self._owed + seconds
            self._owed = 0.0
            return self._free_at

    def wait(self, arrival: float) -> None:
        """Until then, or a little less."""
        left = arrival - time.monotonic()
        if left > SHORTEST_SLEEP:
            time.sleep(left)
        elif left > 0:
            with self._lock:
                if self._free_at == arrival:  # else those behind it wait for it anyway
                    self._free_at -= left
                    self._owed += left


class EmulatedBackend(DeviceBackend):
    """Computes on the CPU, with DEVICE as a separate arena behind links of a stated speed."""

    name = "emulated"
    device = torch.device("cpu")
    lazy = (Tier.HOST,)

    def __init__(self, account: MemoryAccount, machine: EmulatedMachine) -> None:
        super().__init__(account)
        self.machine = machine
        self._paces = {link: _Pace() for link in Link}

    def _allocate(self, tier: Tier, nbytes: int) -> torch.Tensor:
        return map_memory(nbytes)

    def requests_in_flight(self, link: Link) -> int:
        """One under way and the next one ready: what is urgent has to wait for both."""
        return 2

    def request_bytes(self, link: Link) -> int:
        """As long on the way as on a real link: a slow one takes smaller requests."""
        speed = self.machine.speeds.get(link)
        if speed is None:
            return REQUEST_BYTES
        return min(REQUEST_BYTES, padded(int(speed * REQUEST_SECONDS) + 1, DISK_BLOCK))

    def copy(
        self,
        link: Link,
        source: Source,
        target: Target,
        after: Sequence[Any],
        *,
        urgent: bool = False,
    ) -> Any:
        """Copy, then hold the link until the bytes would have arrived at its stated speed."""
        pace, speed = self._paces[link], self.machine.speeds.get(link)
        arrival = 0.0 if speed is None else pace.send(source.nbytes / speed)
        if isinstance(source, TensorRows) and source.staging is not None:
            assert isinstance(target, torch.Tensor)
            staged = source.staging.view(-1)[: target.numel()].view(target.shape)
            source.gather(staged)
            source = staged
        if isinstance(target, ScatteredRows) and target.staging is not None:
            # By way of the pinned staging, as on a GPU: who reuses it too early is found out here.
            assert isinstance(source, torch.Tensor)
            staged = target.staging[: source.numel()].view(source.shape)
            move(source, staged)
            pace.wait(arrival)
            move(staged, target)
        else:
            move(source, target)
            pace.wait(arrival)
        return None
