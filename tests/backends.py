"""Backends whose copies are late, held up or broken: order that is not stated shows itself."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from offload.backend import DeviceBackend
from offload.backend_cpu import CpuBackend
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.errors import OffloadStoreError
from offload.tiers import MemoryAccount

if TYPE_CHECKING:
    from offload.links import Link

SHARE = 0.1
"""Of all copies are late, …"""
SECONDS = 0.05
"""… at most by so much: a sweep of a tiny model is over in that time."""


def make_copies_late(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Let some copies of any link begin or end late, at random."""
    draw = random.Random(seed)

    def late() -> None:
        if draw.random() < SHARE:
            time.sleep(draw.random() * SECONDS)

    def replace(backend: type[DeviceBackend]) -> None:
        copy = backend.copy

        def late_copy(*arguments: Any, **options: Any) -> Any:
            late()
            event = copy(*arguments, **options)
            late()
            return event

        patch.setattr(backend, "copy", late_copy)

    replace(EmulatedBackend)
    replace(CpuBackend)


class GatedBackend(EmulatedBackend):
    """Copy number `held` of `link` (counted from 0) waits at its gate until that is opened."""

    def __init__(self, link: Link, held: int) -> None:
        super().__init__(MemoryAccount(), EmulatedMachine())
        self.gate = threading.Event()
        self._link = link
        self._held = held

    def copy(self, link: Link, *arguments: Any, **options: Any) -> Any:
        if link is self._link:
            self._held -= 1
            if self._held == -1:
                assert self.gate.wait(60)
        return super().copy(link, *arguments, **options)


class BrokenBackend(EmulatedBackend):
    """Nothing crosses `link`."""

    def __init__(self, link: Link) -> None:
        super().__init__(MemoryAccount(), EmulatedMachine())
        self._link = link

    def copy(self, link: Link, *arguments: Any, **options: Any) -> Any:
        if link is self._link:
            raise OffloadStoreError("the link is broken")
        return super().copy(link, *arguments, **options)
