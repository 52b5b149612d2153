"""Bytes on their way between tiers: what waits for them, and what they are counted as."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from offload.backend import DeviceBackend, Source, Target
    from offload.links import HostWork, Link

URGENT = 0
"""Priority of what is computed next: KV pages, embedding rows. Weights have later deadlines."""


class Transfer:
    """Bytes on their way; `wait` orders the device's compute after their arrival."""

    def __init__(
        self, backend: DeviceBackend, parts: int, then: Callable[[], None] | None = None
    ) -> None:
        """Of so many `parts`; `then` is called when all are issued."""
        self._backend = backend
        self._left = parts
        self._lock = threading.Lock()
        # Held until the copy is issued: cheaper to make than an event, and each layer makes many.
        self._latch = threading.Lock()
        self._latch.acquire()
        self._callbacks = [then] if then else []
        self.issued = False
        """Whether the copy was handed to the device (on the CPU: whether it is over)."""
        self.error: BaseException | None = None
        self.events: list[Any] = []
        """What marks the arrival of each part on the device; empty where copies are synchronous."""

    def check(self) -> None:
        """Raise what the copy raised, if it has."""
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        """Compute submitted from now on sees the bytes. Raises what the copy raised."""
        if not self.issued:
            with self._latch:
                pass
        self.check()
        for event in self.events:
            self._backend.order_after(event)

    def synchronize(self) -> None:
        """Block until the bytes have arrived. Raises what the copy raised."""
        self.wait()
        for event in self.events:
            self._backend.synchronize(event)

    def when_issued(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the copy is issued or has failed: now, or in a link's thread."""
        with self._lock:
            if not self.issued:
                self._callbacks.append(callback)
                return
        callback()

    def finish_part(self, event: Any = None, error: BaseException | None = None) -> None:
        """Called once for every part."""
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            if event is not None:
                self.events.append(event)
            if self._left:
                return
            self.issued = True
            callbacks, self._callbacks = self._callbacks, []
        self._latch.release()
        for callback in callbacks:
            callback()


@dataclass(slots=True)
class LinkCounters:
    """What crossed a link so far."""

    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes by what they are: weights, embedding, kv, activations, padding to whole disk blocks."""
    transfers: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def count(self, kind: str, nbytes: int) -> None:
        """`nbytes` of `kind` have crossed."""
        with self._lock:
            self.bytes[kind] = self.bytes.get(kind, 0) + nbytes


@dataclass(slots=True)
class Part:
    """One request of a transfer."""

    priority: int
    number: int
    link: Link
    source: Source | HostWork
    target: Target | None
    """None for work."""
    kind: str
    after: Sequence[Any]
    transfer: Transfer
    padding: int = 0
    """Bytes of it that only complete disk blocks."""
    staged: torch.Tensor | None = None
    """The staging buffer that is the source, given back when the copy is over."""
    relayed: bool = False
    """Goes on from a staging buffer to the device."""
    urgent: bool = False
    """Compute waits for it: on the device it must not follow copies with later deadlines."""
