"""Who was busy when: intervals of links, compute and sampling, for the report and the trace."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from offload.backend import DeviceBackend

COMPUTE = "compute"
SAMPLING = "sampling"
MOST_TRACED = 500_000
"""Intervals kept for a trace; a job of many hours has more, and its first ones tell the story."""
_FOLD_AT = 4096


class Interval(NamedTuple):
    """Something that `row` did from `start` to `end` (seconds of `time.perf_counter`)."""

    row: str
    name: str
    start: float
    end: float
    nbytes: int


@dataclass(slots=True)
class BusyTime:
    """The length of a union of intervals, in bounded memory."""

    seconds: float = 0.0
    _until: float = float("-inf")
    _recent: list[tuple[float, float]] = field(default_factory=list)

    def add(self, start: float, end: float) -> None:
        """Intervals may come in any order within the last few thousand."""
        self._recent.append((start, end))
        if len(self._recent) > _FOLD_AT:
            self.fold()

    def fold(self) -> float:
        """All seconds so far that are in at least one interval."""
        for start, end in sorted(self._recent):
            self.seconds += max(0.0, end - max(start, self._until))
            self._until = max(self._until, end)
        self._recent.clear()
        return self.seconds


class Timeline:
    """Busy seconds per row, and with `traced` every interval.

    A row is a link, `COMPUTE` or `SAMPLING`. On a device that works on its own, an interval is
    known when the device has passed its end: `add_marks` keeps it until then.
    """

    def __init__(self, backend: DeviceBackend, *, traced: bool = False) -> None:
        self._backend = backend
        self._busy: dict[str, BusyTime] = {}
        self._pending: deque[tuple[str, str, Any, Any, int]] = deque()
        self._lock = threading.Lock()
        self.traced = traced
        self.intervals: list[Interval] = []
        self.dropped = 0
        """Intervals that the trace has no room for."""

    def add(self, row: str, name: str, start: float, end: float, nbytes: int = 0) -> None:
        """`row` was busy with `name` from `start` to `end`."""
        with self._lock:
            self._add(row, name, start, end, nbytes)

    def add_marks(self, row: str, name: str, start: Any, end: Any, nbytes: int = 0) -> None:
        """The same with marks of the backend, whose times may not be known yet."""
        with self._lock:
            self._pending.append((row, name, start, end, nbytes))
            self._collect(most=4)

    def _collect(self, most: int | None = None) -> None:
        while self._pending and most != 0:
            row, name, start, end, nbytes = self._pending[0]
            until = self._backend.time_of(end)
            if until is None:
                return
            since = self._backend.time_of(start)
            self._pending.popleft()
            self._add(row, name, until if since is None else since, until, nbytes)
            most = None if most is None else most - 1

    def _add(self, row: str, name: str, start: float, end: float, nbytes: int) -> None:
        self._busy.setdefault(row, BusyTime()).add(start, end)
        if not self.traced:
            return
        if len(self.intervals) < MOST_TRACED:
            self.intervals.append(Interval(row, name, start, end, nbytes))
        else:
            self.dropped += 1

    def busy_seconds(self, row: str) -> float:
        """Seconds in which `row` did something."""
        with self._lock:
            self._collect()
            return self._busy[row].fold() if row in self._busy else 0.0

    def finish(self) -> list[Interval]:
        """All traced intervals, in order of their start."""
        with self._lock:
            self._collect()
            return sorted(self.intervals, key=lambda interval: interval.start)
