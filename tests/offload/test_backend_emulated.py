"""Emulated links keep to their speed, also where copies are too short to sleep for."""

from __future__ import annotations

import threading

import pytest
import torch

from offload.backend_emulated import SHORTEST_SLEEP, EmulatedBackend, EmulatedMachine
from offload.links import Link
from offload.tiers import MemoryAccount

SPEED = 1e6


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept = 0.0
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds
            self.slept += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("offload.backend_emulated.time", clock)
    return clock


@pytest.fixture
def backend() -> EmulatedBackend:
    return EmulatedBackend(MemoryAccount(), EmulatedMachine(None, {Link.HOST_TO_DEVICE: SPEED}))


def send(backend: EmulatedBackend, nbytes: int, link: Link = Link.HOST_TO_DEVICE) -> None:
    source = torch.zeros(nbytes, dtype=torch.uint8)
    backend.copy(link, source, torch.empty_like(source), [])


@pytest.mark.parametrize("nbytes", [1, 10, 99, 100, 101, 5000])
@pytest.mark.parametrize("gap", [0.0, 20e-6, 1.0])
def test_copies_take_their_time(clock, backend, nbytes, gap):
    """Also those with pauses between them, each of which is too short to sleep for."""
    for _ in range(1000):
        send(backend, nbytes)
        clock.now += gap
    busy = 1000 * nbytes / SPEED
    waited = clock.slept if gap >= 1 else clock.now - 100.0
    assert waited >= busy - 2 * SHORTEST_SLEEP
    assert clock.slept <= busy + 1e-6


def test_copies_of_two_threads_follow_each_other(clock, backend):
    def run() -> None:
        for _ in range(500):
            send(backend, 40)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.now - 100.0 >= 1000 * 40 / SPEED - 2 * SHORTEST_SLEEP


def test_other_links_are_not_held_up(clock, backend):
    send(backend, 5000, Link.DEVICE_TO_HOST)
    assert clock.slept == 0
