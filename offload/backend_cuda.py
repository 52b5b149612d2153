"""A CUDA GPU: pinned host memory, one stream per link and purpose, order kept by events alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offload.backend import DeviceBackend, Source, Target, move
from offload.errors import CapacityError
from offload.links import FileExtent, Link, PageSlots, TensorRows
from offload.pinned import PinnedMemory
from offload.tiers import BUDGET_FLAG, MemoryAccount, Tier, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence


class CudaBackend(DeviceBackend):
    """Computes on the current CUDA device; nothing here synchronises the whole device."""

    name = "cuda"

    def __init__(self, account: MemoryAccount, device: torch.device) -> None:
        super().__init__(account)
        self.device = device
        self._pinned = PinnedMemory()
        self._streams = {
            link: torch.cuda.Stream(device) for link in (Link.HOST_TO_DEVICE, Link.DEVICE_TO_HOST)
        }
        # Rows are for what is computed next: they must not queue behind a whole layer's weights.
        self._rows_in = torch.cuda.Stream(device)

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
            self._finish_copies()  # a run that was broken off leaves some under way
            self._pinned.free(tensor)

    def copy(self, link: Link, source: Source, target: Target, after: Sequence[Any]) -> Any:
        """Issue the copy on the link's stream; the returned event marks its end there."""
        stream = self._rows_in if isinstance(source, TensorRows) else self._streams.get(link)
        if stream is None:
            # RAM and disk: this thread moves the bytes, so it waits for the device to let go.
            for event in after:
                self.synchronize(event)
            move(source, target)
            return None
        if isinstance(source, TensorRows):
            # This thread gathers into pinned staging that an earlier copy may still be reading.
            for event in after:
                self.synchronize(event)
        for event in after:
            if event is not None:
                stream.wait_event(event)
        for tensor in (source, target):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                tensor.record_stream(stream)  # keeps the allocator from reusing it too early
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            self._issue(source, target)
            event = torch.cuda.Event()
            event.record(stream)
        return event

    def _issue(self, source: Source, target: Target) -> None:
        if isinstance(source, TensorRows):
            assert source.staging is not None
            assert isinstance(target, torch.Tensor)
            staging = source.staging[: target.numel()].view(target.shape)
            source.gather(staging)
            target.copy_(staging, non_blocking=True)
        elif isinstance(target, PageSlots):
            assert target.staging is not None
            assert isinstance(source, torch.Tensor)
            staging = target.staging[: source.numel()].view(source.shape)
            staging.copy_(source, non_blocking=True)
            torch.cuda.current_stream().synchronize()  # the rows must be in RAM to be scattered
            target.scatter(staging)
        else:
            assert isinstance(source, torch.Tensor)
            assert not isinstance(target, FileExtent)
            target.copy_(source, non_blocking=True)

    def record(self) -> Any:
        """An event on the compute stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def order_after(self, event: Any) -> None:
        """The compute stream waits for `event`; the calling thread does not."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self, event: Any) -> None:
        """Block this thread, not the device."""
        if event is not None:
            event.synchronize()

    def _finish_copies(self) -> None:
        for stream in (*self._streams.values(), self._rows_in):
            stream.synchronize()

    def close(self) -> None:
        """Unpin host memory once its copies are over, and give device memory back to CUDA."""
        self._finish_copies()
        self._pinned.close()
        torch.cuda.empty_cache()  # what torch keeps for itself is not free for the next engine
