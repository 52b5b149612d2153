"""How far a sequence is, and the sequences that wait: token counts, never the tokens (no torch)."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True)
class Progress:
    """What a scheduler knows of a sequence."""

    sequence: int
    tokens: int
    """Tokens so far: the prompt and what was generated."""
    most_tokens: int
    """Tokens the sequence may grow to."""
    shared: int = 0
    """The first positions, which are the same in all sequences of the group."""
    group: int = -1
    computed: int = 0
    """Positions whose keys and values are in the KV cache."""
    handed_over: int = 0
    """It waits, and so many of these another machine has computed: they get pages when it joins."""
    swapped: bool = False
    """It waits, and these are on the swap tier."""
    last_sweep: int = -1
    """The last sweep it had rows in."""
    prompt_rows: int = 0
    """Rows so far of its prompt, and of what is computed again as if it were one."""
    generated: int = 0
    """Sweeps so far that gave it a token."""

    @property
    def pending(self) -> int:
        return self.tokens - self.computed


class WaitingQueue:
    """Sequences without a place: those that had one before all others, then in the chosen order.

    `longest`: the most tokens to generate first, so that a job does not end with few long
    sequences in sweeps that have room for many (longest processing time first; Graham, 1969).
    Sequences that may generate as much, and with `input` all of them, come in the order in which
    they were added.
    """

    def __init__(self, order: str = "input") -> None:
        self._longest_first = order == "longest"
        self._front: deque[Progress] = deque()
        self._heap: list[tuple[int, int, Progress]] = []
        self._added = 0

    def __len__(self) -> int:
        return len(self._front) + len(self._heap)

    def __iter__(self) -> Iterator[Progress]:
        """In the order in which they leave."""
        yield from self._front
        yield from (progress for _, _, progress in sorted(self._heap))

    def add(self, progress: Progress) -> None:
        """Behind all that go before it in the order."""
        length = progress.most_tokens - progress.tokens if self._longest_first else 0
        heapq.heappush(self._heap, (-length, self._added, progress))
        self._added += 1

    def put_back(self, progress: Progress) -> None:
        """Before all others."""
        self._front.appendleft(progress)

    def pop(self) -> Progress:
        """The next one."""
        return self._front.popleft() if self._front else heapq.heappop(self._heap)[2]

    def remove(self, sequence: int) -> None:
        """Take one out, wherever it is."""
        self._front = deque(each for each in self._front if each.sequence != sequence)
        self._heap = [each for each in self._heap if each[2].sequence != sequence]
        heapq.heapify(self._heap)
