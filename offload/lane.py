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
        self._heap: list[Part] = []
        self._changed = threading.Condition()
        self._closing = False
        self._running = 0
        self._threads = [
            threading.Thread(target=self._serve, name=name, daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, parts: list[Part]) -> None:
        """Queue parts."""
        with self._changed:
            self._heap += parts
            heapq.heapify(self._heap)
            self._changed.notify(len(parts))

    @property
    def idle(self) -> bool:
        """Nothing is queued and no thread runs anything."""
        with self._changed:
            return not self._heap and not self._running

    def __len__(self) -> int:
        return len(self._heap)

    def _take(self) -> Part | None:
        with self._changed:
            while not self._heap:
                if self._closing:
                    return None
                self._changed.wait()
            self._running += 1
            return heapq.heappop(self._heap)

    def _ran(self) -> None:
        with self._changed:
            self._running -= 1

    def _serve(self) -> None:
        # Tensors made in inference mode can only be written in inference mode, in any thread.
        with torch.inference_mode():
            while (part := self._take()) is not None:
                self._run(part)
                self._ran()
                del part  # a thread that waits must not keep memory alive

    def close(self) -> None:
        """Run what is queued and end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
