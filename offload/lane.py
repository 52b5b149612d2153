"""The queue of one link: copies that may start, taken by deadline by the link's own threads."""

from __future__ import annotations

import heapq
import threading
from queue import SimpleQueue
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
        self._running = 0
        self._lock = threading.Lock()
        self._wake: SimpleQueue[None] = SimpleQueue()
        """One item for each part, and at the end some for each thread. Unlike with a condition
        variable, waking a thread costs the one that computes next to nothing."""
        self._threads = [
            threading.Thread(target=self._serve, name=name, daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, parts: list[Part]) -> None:
        """Queue parts."""
        with self._lock:
            for part in parts:
                heapq.heappush(self._heap, (part.priority, part.number, part))
        for _ in parts:
            self._wake.put(None)

    @property
    def idle(self) -> bool:
        """No thread has anything to run."""
        return self._wake.empty() and not self._running

    def __len__(self) -> int:
        return len(self._heap)

    def _take(self) -> Part | None:
        self._wake.get()
        with self._lock:
            self._running += 1
            return heapq.heappop(self._heap)[2] if self._heap else None

    def _ran(self) -> None:
        with self._lock:
            self._running -= 1

    def _serve(self) -> None:
        # Tensors made in inference mode can only be written in inference mode, in any thread.
        with torch.inference_mode():
            while (part := self._take()) is not None:
                self._run(part)
                self._ran()
                del part  # a thread that waits must not keep memory alive
            self._ran()

    def close(self) -> None:
        """Run what is queued and end the threads."""
        for thread in self._threads:
            # Again and again: if an interrupt hit `put`, there are parts without an item.
            while thread.is_alive():
                self._wake.put(None)
                thread.join(0.05)
        self._threads.clear()
