"""Facts about busy times and traced intervals."""

from __future__ import annotations

import random

import pytest

from offload.backend_cpu import CpuBackend
from offload.tiers import MemoryAccount
from offload.timeline import BusyTime, Interval, Timeline


class DeviceTime(CpuBackend):
    """Marks are passed when the test says so."""

    now = 0.0

    def time_of(self, mark: float) -> float | None:
        return mark if mark <= self.now else None


@pytest.mark.parametrize("seed", range(5))
def test_busy_time_is_the_length_of_the_union(seed):
    """Overlapping intervals in nearly any order count once, however many there are."""
    draw = random.Random(seed)
    ticks: set[int] = set()
    busy = BusyTime()
    for number in range(10_000):
        start = number * 3 + draw.randint(0, 20)
        length = draw.randint(0, 4)
        ticks |= set(range(start, start + length))
        busy.add(start, start + length)
    assert busy.fold() == pytest.approx(len(ticks), rel=2e-3)


def test_the_union_is_exact_within_the_memory():
    """A long interval that is reported after short ones within it counts whole, once."""
    busy = BusyTime()
    for interval in ((1.0, 2.0), (3.0, 4.0), (0.0, 5.0), (6.0, 7.5)):
        busy.add(*interval)
    assert busy.fold() == 6.5
    assert busy.fold() == 6.5


def test_intervals_are_kept_only_for_a_trace():
    """Without a trace a timeline keeps sums; with one, every interval in order."""
    for traced in (False, True):
        timeline = Timeline(CpuBackend(MemoryAccount()), traced=traced)
        timeline.add("compute", "b", 2.0, 3.0)
        timeline.add("compute", "a", 0.0, 1.0, nbytes=7)
        assert timeline.busy_seconds("compute") == 2.0
        assert timeline.busy_seconds("nothing") == 0.0
        expected = [
            Interval("compute", "a", 0.0, 1.0, 7),
            Interval("compute", "b", 2.0, 3.0, 0),
        ]
        assert timeline.finish() == (expected if traced else [])


def test_marks_count_when_the_device_has_passed_them():
    """An interval between marks is known, in order, once the device has passed its end."""
    backend = DeviceTime(MemoryAccount())
    timeline = Timeline(backend)
    timeline.add_marks("host->device", "weights", 1.0, 3.0, 10)
    timeline.add_marks("host->device", "weights", 3.0, 4.0, 10)
    assert timeline.busy_seconds("host->device") == 0.0
    backend.now = 3.5
    assert timeline.busy_seconds("host->device") == 2.0
    backend.now = 9.0
    assert timeline.busy_seconds("host->device") == 3.0
