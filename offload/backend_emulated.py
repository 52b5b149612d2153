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
"""The system wakes a thread up later by about so much, and each time takes a core from others. What
is not waited for now, the link's next copy waits for."""
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
        self._lock = threading.Lock()

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
        arrival = self._arrival(link, source.nbytes)
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
            _sleep_until(arrival)
            move(staged, target)
        else:
            move(source, target)
            _sleep_until(arrival)
        return None

    def _arrival(self, link: Link, nbytes: int) -> float:
        """When bytes sent now are through: those of one link follow each other."""
        speed = self.machine.speeds.get(link)
        if speed is None:
            return 0.0
        with self._lock:
            self._free_at[link] = max(time.monotonic(), self._free_at[link]) + nbytes / speed
            return self._free_at[link]


def _sleep_until(arrival: float) -> None:
    if (left := arrival - time.monotonic()) > SHORTEST_SLEEP:
        time.sleep(left)
