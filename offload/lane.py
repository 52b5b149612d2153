"""The queue of one link: copies that may start, taken by deadline by the link's own threads."""

from __future__ import annotations

import heapq
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload.transfer import Part


class Lane:
    """Threads that run the parts put into it, the most urgent first.

    Only parts that can run at once are put in: what waits for something waits outside, so nothing
    holds up what comes after it.
    """

    def __init__(self, name: str, threads: int, run: Callable[[Part], None]) -> None:
        self._run = run
        self._heap: list[tuple[int, int, Part]] = []
        self._lock = threading.Lock()
        self._closing = False
        # Each thread sleeps on a latch of its own: unlike with a condition variable, waking one
        # costs the thread that computes next to nothing, and never wakes two for one part. A latch
        # is always locked, but for the moment between its release and the thread's waking up.
        self._latches = [threading.Lock() for _ in range(threads)]
        for latch in self._latches:
            latch.acquire()
        self._asleep: list[threading.Lock] = []
        self._threads = [
            threading.Thread(target=self._serve, args=(latch,), name=name, daemon=True)
            for latch in self._latches
        ]
        for thread in self._threads:
            thread.start()

    def put(self, parts: list[Part]) -> None:
        """Queue parts."""
        with self._lock:
            for part in parts:
                heapq.heappush(self._heap, (part.priority, part.number, part))
            for _ in range(min(len(parts), len(self._asleep))):
                self._asleep.pop().release()

    @property
    def idle(self) -> bool:
        """All threads sleep: whatever is queued, nothing will run."""
        with self._lock:
            return len(self._asleep) >= len(self._threads)

    def __len__(self) -> int:
        return len(self._heap)

    def _take(self, latch: threading.Lock) -> Part | None:
        while True:
            with self._lock:
                if self._heap:
                    return heapq.heappop(self._heap)[2]
                if self._closing:
                    return None
                self._asleep.append(latch)
            latch.acquire()

    def _serve(self, latch: threading.Lock) -> None:
        # Tensors made in inference mode can only be written in inference mode, in any thread.
        with torch.inference_mode():
            while (part := self._take(latch)) is not None:
                self._run(part)
                del part  # a thread that waits must not keep memory alive

    def close(self) -> None:
        """Run what is queued and end the threads; may be called again."""
        with self._lock:
            self._closing = True
            self._asleep.clear()
            for latch in self._latches:
                if latch.locked():
                    latch.release()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
