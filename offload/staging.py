"""Pinned buffers that bytes pass through on their way from disk to the device."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from offload.backend import DeviceBackend


KEPT = 3
"""Buffers that only urgent reads may take: the others may all wait for a slot on the device."""


class StagingBuffers:
    """A few buffers of one request each; whoever needs one waits until one is free."""

    def __init__(self, buffers: list[torch.Tensor], backend: DeviceBackend) -> None:
        self._backend = backend
        self.size = min(buffer.nbytes for buffer in buffers)
        """Most bytes of one request."""
        self._free: list[tuple[torch.Tensor, Any]] = [(buffer, None) for buffer in buffers]
        self._kept = min(KEPT, len(buffers) - 1)
        self._changed = threading.Condition()

    def acquire(self, *, urgent: bool = False) -> torch.Tensor:
        """A buffer whose last copy to the device is over."""
        with self._changed:
            while len(self._free) <= (0 if urgent else self._kept):
                self._changed.wait()
            buffer, event = self._free.pop(0)
        self._backend.synchronize(event)
        return buffer

    def release(self, buffer: torch.Tensor, event: Any) -> None:
        """The buffer is free after `event`."""
        with self._changed:
            self._free.append((buffer, event))
            self._changed.notify_all()
