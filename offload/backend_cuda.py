"""A CUDA GPU: pinned host memory, streams for every direction and purpose, ordered by events."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from offload.backend import DeviceBackend, Source, Target, copy_bytes, move
from offload.copy_stream import Copied, CopyStream, end_of, new_event
from offload.errors import CapacityError
from offload.links import FileExtent, Link, ScatteredRows, TensorRows
from offload.pinned import PinnedMemory
from offload.tiers import BUDGET_FLAG, REQUEST_BYTES, MemoryAccount, Tier, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

TO_DEVICE_BYTES = 16 * 2**20
"""Of one copy to the device: two of them outlast the wait of a thread for the interpreter."""
RAW_SECONDS = 0.2
"""That the raw speed of the link to the device is measured for, …"""
RAW_BYTES = 1 << 30
"""… with about so many bytes at most, again and again."""
_EPOCH_SECONDS = 60.0
"""CUDA tells the time between two events as float32: exact to microseconds only this far."""


class CudaBackend(DeviceBackend):
    """Computes on the current CUDA device; nothing here synchronises the whole device."""

    name = "cuda"
    blocking_links = (Link.DISK_TO_HOST, Link.HOST_TO_DEVICE)

    def __init__(self, account: MemoryAccount, device: torch.device) -> None:
        super().__init__(account)
        self.device = device
        self._pinned = PinnedMemory()
        # Weights in, KV and embedding rows in, everything out: none waits behind another.
        self._weights_in, self._rows_in, self._out = (CopyStream(device) for _ in range(3))
        self._gathers: dict[int, Copied] = {}
        """By address of pinned staging for rows: the last copy out of it."""
        self._bounce = threading.local()
        self._bounce_buffers: list[torch.Tensor] = []
        self._epoch = new_event()
        self._epoch.record(torch.cuda.current_stream(device))
        self._epoch.synchronize()
        self._epoch_seconds = time.perf_counter()
        self._epoch_lock = threading.Lock()

    def _allocate(self, tier: Tier, nbytes: int) -> torch.Tensor:
        try:
            if tier is Tier.HOST:
                return self._pinned.allocate(nbytes)
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except (torch.OutOfMemoryError, OSError) as error:
            raise CapacityError(
                f"{format_size(nbytes)} could not be had on {tier}, though the budget allows it",
                hint=f"lower {BUDGET_FLAG[tier]}, or end other programs that use this memory",
            ) from error

    def _free(self, tier: Tier, tensor: torch.Tensor) -> None:
        if tier is Tier.HOST:
            try:
                self._finish_copies()  # a run that was broken off leaves some under way
            except RuntimeError as error:  # of the device: the rest has to be freed all the same
                logger.warning("waiting for copies before memory is freed: %s", error)
            self._pinned.free(tensor)

    def request_bytes(self, link: Link) -> int:
        """Larger to the device: some are handed over ahead, and must last until a thread wakes."""
        return TO_DEVICE_BYTES if link is Link.HOST_TO_DEVICE else REQUEST_BYTES

    def copy(
        self,
        link: Link,
        source: Source,
        target: Target,
        after: Sequence[Any],
        *,
        urgent: bool = False,
    ) -> Any:
        """Issue the copy on its stream; the returned event marks its end there."""
        if link not in (Link.HOST_TO_DEVICE, Link.DEVICE_TO_HOST):
            # RAM and disk: this thread moves the bytes, so it waits for the device to let go.
            for event in after:
                self.synchronize(event)
            move(source, target)
            return None
        gathered: int | None = None
        if isinstance(source, TensorRows):
            assert source.staging is not None
            gathered = source.staging.data_ptr()
            # This thread gathers into pinned staging that an earlier copy may still be reading.
            # For the rest, `after`, the stream waits: the thread is needed for other copies.
            written = (each for each in after if isinstance(each, Copied) and each.to_ram)
            for each in (self._gathers.get(gathered), *written):
                self.synchronize(each)
            source = self._gathered(source, target)
        else:
            source = self._through_pinned(source, after)
        incoming = self._rows_in if urgent else self._weights_in
        copies = incoming if link is Link.HOST_TO_DEVICE else self._out
        copies.make_room()
        with torch.cuda.device(self.device), torch.cuda.stream(copies.stream):
            copied = self._issue(copies, source, target, after)
            if gathered is not None:
                self._gathers[gathered] = copied
        return copied

    def _issue(
        self, copies: CopyStream, source: Source, target: Target, after: Sequence[Any]
    ) -> Copied:
        assert isinstance(source, torch.Tensor)
        assert not isinstance(target, FileExtent)
        stream = copies.stream
        for event in after:
            if event is not None:
                stream.wait_event(end_of(event))
        for tensor in (source, target):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                tensor.record_stream(stream)  # keeps the allocator from reusing it too early
        begin, end = (new_event() for _ in range(2))
        begin.record(stream)
        if isinstance(target, ScatteredRows):
            assert target.staging is not None
            staging = target.staging[: source.numel()].view(source.shape)
            staging.copy_(source, non_blocking=True)
            end.record(stream)
            end.synchronize()  # the rows must be in RAM to be scattered
            target.scatter(staging)
        else:
            target.copy_(source, non_blocking=True)
            end.record(stream)
        copies.issued(end)
        if isinstance(source, torch.Tensor) and source.device.type == "cpu":
            self._note_bounced(source, end)
        return Copied(begin, end, to_ram=copies is self._out)

    def _gathered(self, rows: TensorRows, target: Target) -> torch.Tensor:
        assert rows.staging is not None
        assert isinstance(target, torch.Tensor)
        staging = rows.staging[: target.numel()].view(target.shape)
        rows.gather(staging)
        return staging

    def _through_pinned(self, source: Source, after: Sequence[Any]) -> Source:
        """Where pinning a slab was refused, its requests go through a small pinned ring."""
        if not isinstance(source, torch.Tensor) or source.is_cuda:
            return source
        fits = source.dtype is torch.uint8 and source.dim() == 1
        if self._pinned.is_pinned(source) or source.nbytes > TO_DEVICE_BYTES or not fits:
            return source
        if not hasattr(self._bounce, "ring"):
            self._bounce.ring = self._bounce_ring()
        if not self._bounce.ring:
            return source
        buffer, event = self._bounce.ring.popleft()
        for each in (event, *after):  # this thread reads what the stream would have waited for
            self.synchronize(each)
        bounced: torch.Tensor = buffer[: source.nbytes]
        copy_bytes(source, bounced)
        self._bounce.ring.append((buffer, None))
        return bounced

    def _bounce_ring(self) -> deque[tuple[torch.Tensor, Any]]:
        """Pinned buffers of this thread; none where they cannot be had: they only save time."""
        what = "a ring in place of what could not be pinned"
        buffers = []
        with contextlib.suppress(CapacityError):
            for _ in range(2):
                buffers.append(self.allocate(Tier.HOST, TO_DEVICE_BYTES, what))
        self._bounce_buffers += buffers
        return deque((buffer, None) for buffer in buffers if self._pinned.is_pinned(buffer))

    def _note_bounced(self, source: torch.Tensor, end: torch.cuda.Event) -> None:
        ring = getattr(self._bounce, "ring", None)
        if ring and source.untyped_storage().data_ptr() == ring[-1][0].data_ptr():
            ring[-1] = (ring[-1][0], end)

    def record(self) -> Any:
        """An event on the compute stream."""
        event = new_event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def mark(self) -> Any:
        """The compute stream's point in time."""
        return self.record()

    def marks_of(self, event: Any) -> tuple[Any, Any]:
        """The copy's begin and end on its stream."""
        return event.begin, event.end

    def time_of(self, mark: Any) -> float | None:
        """From the time between the mark and an earlier one whose time is known."""
        if not mark.query():
            return None
        with self._epoch_lock:
            passed = float(self._epoch.elapsed_time(mark)) / 1000
            seconds = self._epoch_seconds + passed
            if passed > _EPOCH_SECONDS:
                self._epoch, self._epoch_seconds = mark, seconds
            return seconds

    def raw_speed(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float | None:
        """On one stream, without threads, requests and events between the copies."""
        copied, total = [], 0
        for pair in pairs:
            if total < RAW_BYTES and (pair[0].is_pinned() or self._pinned.is_pinned(pair[0])):
                copied.append(pair)
                total += pair[0].nbytes
        if not copied:
            return None
        stream, (begin, end) = self._weights_in.stream, (new_event(), new_event())
        with torch.cuda.stream(stream):
            for timed in (False, True):
                begin.record(stream)
                for source, target in copied:
                    target.copy_(source, non_blocking=True)
                end.record(stream)
                end.synchronize()
                if not timed:
                    seconds = begin.elapsed_time(end) / 1000
                    times = max(1, min(100, int(RAW_SECONDS / max(seconds, 1e-6))))
                    copied = copied * times
        return sum(s.nbytes for s, _ in copied) / (begin.elapsed_time(end) / 1000)

    def order_after(self, event: Any) -> None:
        """The compute stream waits for `event`; the calling thread does not."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(end_of(event))

    def synchronize(self, event: Any) -> None:
        """Block this thread, not the device."""
        if event is not None:
            end_of(event).synchronize()

    def _finish_copies(self) -> None:
        for copies in (self._weights_in, self._rows_in, self._out):
            copies.stream.synchronize()

    def close(self) -> None:
        """Unpin host memory once its copies are over, and give device memory back to CUDA."""
        super().close()
        self._finish_copies()
        self._gathers.clear()
        for buffer in self._bounce_buffers:
            self.free(Tier.HOST, buffer)
        self._bounce_buffers.clear()
        self._pinned.close()
        torch.cuda.empty_cache()  # what torch keeps for itself is not free for the next engine
