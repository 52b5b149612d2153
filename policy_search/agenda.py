"""What is going to happen on the virtual clock, and in which order (no torch)."""

from __future__ import annotations

from enum import IntEnum
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Kind(IntEnum):
    """In the order in which events of one instant are handled: sweeps see all the others."""

    ARRIVAL = 0
    """Of a request."""
    DELIVERY = 1
    """Of a request's keys and values."""
    SWEEP_END = 2
    """Of a machine's sweep."""
    SWEEP_START = 3


class Event(NamedTuple):
    """Ordered by time, kind and number, so that a simulation always repeats itself."""

    time: float
    """Seconds."""
    kind: Kind
    number: int
    """Of the request or machine."""


class Agenda:
    """Events that are still to come; iterating ends when there are none."""

    def __init__(self, arrivals: Sequence[float]) -> None:
        """`arrivals`: a time for every request, in any order."""
        self._later: list[Event] = []
        self._arrivals = arrivals
        # Not in the heap: of a job's requests hundreds of thousands arrive at once.
        self._order = sorted(range(len(arrivals)), key=arrivals.__getitem__)
        self._arrived = 0

    def add(self, time: float, kind: Kind, number: int) -> None:
        """Something that will happen."""
        heappush(self._later, Event(time, kind, number))

    def __iter__(self) -> Iterator[Event]:
        """Events as they become due; new ones may be added meanwhile."""
        while (arrival := self._next_arrival()) is not None or self._later:
            if arrival is None or (self._later and self._later[0] < arrival):
                yield heappop(self._later)
            else:
                self._arrived += 1
                yield arrival

    def _next_arrival(self) -> Event | None:
        if self._arrived == len(self._order):
            return None
        number = self._order[self._arrived]
        return Event(self._arrivals[number], Kind.ARRIVAL, number)
