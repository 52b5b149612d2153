"""Memory and time for measurements: within the budgets, given back, and no longer than allowed."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload.backend import DeviceBackend
    from offload.tiers import Tier

_MOST = 15
"""Measurements that a median is of."""
_LONG_ENOUGH = 0.002
"""Seconds that are measured at once: waiting for a device takes a hundredth of it."""
_BLOCK = 65_521
"""Random values; a prime number, so that no two rows of a matrix are alike."""
_WHAT = "a measurement of the machine"


class Room(contextlib.ExitStack):
    """What a measurement takes of the budgets; all of it is given back at the end."""

    def __init__(self, backend: DeviceBackend) -> None:
        super().__init__()
        self.backend = backend

    def left(self, tier: Tier) -> int:
        """Bytes of `tier` that nobody has taken. Its budget has to be limited."""
        left = self.backend.account.available(tier)
        assert left is not None, "a machine's memory is never without a limit"
        return max(0, left)

    def charge(self, tier: Tier, nbytes: int) -> None:
        """For what others allocate. Raises `CapacityError`."""
        self.backend.account.charge(tier, nbytes, _WHAT)
        self.callback(self.backend.account.refund, tier, nbytes)

    def take(self, tier: Tier, nbytes: int) -> torch.Tensor:
        """Written memory, uint8 [nbytes]. Raises `CapacityError`."""
        memory = self.backend.allocate(tier, nbytes, _WHAT)
        self.callback(self.backend.free, tier, memory)
        return memory.fill_(1)

    def take_pages(self, tier: Tier, nbytes: int) -> torch.Tensor:
        """The same in the kind of memory that KV pages are in."""
        if tier not in self.backend.lazy:
            return self.take(tier, nbytes)
        self.charge(tier, nbytes)
        return self.backend.reserve(nbytes).fill_(1)

    @staticmethod
    def numbers(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`memory` as random values, as power and thus speed depend on them; flat.

        The same ones are repeated: to draw as many as fill a cache would take seconds.
        """
        values = memory.view(dtype)
        done = min(_BLOCK, len(values))
        own = torch.Generator(values.device).manual_seed(0)  # the program's numbers stay its own
        values[:done] = torch.randn(done, device=values.device, generator=own)
        while done < len(values):
            more = min(done, len(values) - done)
            values[done : done + more] = values[:more]
            done += more
        return values


def median_seconds(
    backend: DeviceBackend, call: Callable[[], object], seconds: float = 0.0
) -> float:
    """Of one `call`: measured again and again for `seconds`, but at least once.

    One call before is not counted: it may compile, and finds caches cold. Calls that are short
    follow each other without a wait for the device.
    """
    call()
    times = max(1, math.ceil(_LONG_ENOUGH / _seconds(backend, call, 1)))
    return median_of(lambda _: _seconds(backend, call, times) / times, seconds)


def median_of(measure: Callable[[int], float], seconds: float) -> float:
    """Of what `measure` finds, called with 0, 1, …, for `seconds` but at least once."""
    start, found = time.perf_counter(), [measure(0)]
    while len(found) < _MOST and time.perf_counter() - start < seconds:
        found.append(measure(len(found)))
    return statistics.median(found)


def _seconds(backend: DeviceBackend, call: Callable[[], object], times: int) -> float:
    backend.synchronize(backend.record())
    start = time.perf_counter()
    for _ in range(times):
        call()
    backend.synchronize(backend.record())
    return max(time.perf_counter() - start, 1e-9)
