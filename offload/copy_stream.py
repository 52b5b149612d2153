"""Streams of a GPU that copies are handed to, a few ahead, and what marks their ends."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

IN_FLIGHT = 3
"""Copies of one stream that are handed to the device ahead: enough to leave no gap, few enough
that an urgent one does not wait behind a whole layer's weights."""


@dataclass(frozen=True, slots=True)
class Copied:
    """The begin and the end of a copy on its stream."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    to_ram: bool = False
    """RAM has the bytes only when the device has passed `end`."""


def new_event() -> torch.cuda.Event:
    """One that can tell its time, and whose waiters sleep instead of keeping a core busy."""
    return torch.cuda.Event(enable_timing=True, blocking=True)


def end_of(event: Any) -> torch.cuda.Event:
    """Of a copy, its end; any other event is its own."""
    return event.end if isinstance(event, Copied) else event


class CopyStream:
    """A stream that holds a bounded number of copies."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._ends: deque[torch.cuda.Event] = deque()

    def make_room(self) -> None:
        """Block this thread until the stream may take another copy."""
        while len(self._ends) >= IN_FLIGHT:
            try:
                end = self._ends.popleft()
            except IndexError:  # another thread was faster
                return
            end.synchronize()

    def issued(self, end: torch.cuda.Event) -> None:
        """A copy that ends there was handed over."""
        self._ends.append(end)
