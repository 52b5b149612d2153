"""What a compute device offers the rest of the engine: memory, copies and their order."""

from __future__ import annotations

import ctypes
import sys
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from offload.links import FileExtent, FileRows, Link, ScatteredRows, TensorRows
from offload.ram import map_memory
from offload.tiers import REQUEST_BYTES, MemoryAccount, Tier

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

SWITCH_SECONDS = 2e-5
"""How long one thread may keep the interpreter from others. With Python's 5 ms, the thread that
computes waits after most operations for one that feeds a link, and the other way round."""
Source = torch.Tensor | FileExtent | FileRows | TensorRows
Target = torch.Tensor | FileExtent | ScatteredRows


class DeviceBackend(ABC):
    """The compute device and the links around it.

    An *event* marks a point in the device's work; None stands for work that is already done.
    """

    name: str
    device: torch.device
    unified = False
    """HOST is the memory the device computes in: nothing on HOST has to move."""
    links: Sequence[Link] = (
        Link.DISK_TO_HOST,
        Link.HOST_TO_DEVICE,
        Link.DEVICE_TO_HOST,
        Link.HOST_TO_DISK,
    )

    blocking_links: Collection[Link] = ()
    """Links whose threads may have to wait for the device before they can copy anything."""

    lazy: Collection[Tier] = ()
    """Tiers whose memory is taken when it is first written, so a reservation costs nothing."""

    _open: ClassVar[set[int]] = set()
    """Backends that are not closed, and …"""
    _switch_seconds: ClassVar[float] = 0.0
    """… what the interpreter's switch interval was before the first of them."""

    def __init__(self, account: MemoryAccount) -> None:
        self.account = account
        if not self._open:
            DeviceBackend._switch_seconds = sys.getswitchinterval()
            sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_seconds))
        self._open.add(id(self))

    @property
    def disk_in(self) -> Link:
        """The link that reads from disk go over."""
        return Link.DISK_TO_DEVICE if self.unified else Link.DISK_TO_HOST

    def allocate(self, tier: Tier, nbytes: int, what: str) -> torch.Tensor:
        """A uint8 tensor [nbytes] on DEVICE or HOST, charged. Raises `CapacityError`."""
        self.account.charge(tier, nbytes, what)
        try:
            return self._allocate(tier, nbytes)
        except BaseException:
            self.account.refund(tier, nbytes)
            raise

    def free(self, tier: Tier, tensor: torch.Tensor) -> None:
        """Give back what `allocate` returned; the caller drops its references."""
        self.account.refund(tier, tensor.nbytes)
        self._free(tier, tensor)

    def reserve(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor [nbytes] of zeros in a lazy tier, charged by the caller as it is used."""
        return map_memory(nbytes, huge_pages=False)

    @abstractmethod
    def _allocate(self, tier: Tier, nbytes: int) -> torch.Tensor: ...

    def _free(self, tier: Tier, tensor: torch.Tensor) -> None:
        """Release what the allocator does not free with the tensor's last reference."""

    def copy(
        self,
        link: Link,
        source: Source,
        target: Target,
        after: Sequence[Any],
        *,
        urgent: bool = False,
    ) -> Any:
        """Move bytes on the link's thread, once the events `after` happened; returns an event.

        What is `urgent` must not wait for what is not.
        """
        move(source, target)

    def requests_in_flight(self, link: Link) -> int:
        """Copies of `link` that are under way at the same time."""
        return 4 if link in (Link.DISK_TO_HOST, Link.DISK_TO_DEVICE) else 2

    def request_bytes(self, link: Link) -> int:
        """Most bytes of one copy on `link`: large ones are cut, so that urgent ones get between."""
        return REQUEST_BYTES

    def record(self) -> Any:
        """An event at the end of the compute submitted so far."""
        return None

    def mark(self) -> Any:
        """A point in time in the compute submitted so far, for `time_of`."""
        return time.perf_counter()

    def marks_of(self, event: Any) -> tuple[Any, Any]:
        """Marks of the begin and the end of the copy that `event` is of."""
        raise NotImplementedError  # only asked of a backend whose copies return events

    def time_of(self, mark: Any) -> float | None:
        """When `mark` was passed, as `time.perf_counter` tells it; None if it is still ahead."""
        return float(mark)

    def raw_speed(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float | None:
        """Bytes per second of plain copies one after another; None: as the transfer engine does."""
        return None

    def order_after(self, event: Any) -> None:
        """Compute submitted from now on starts after `event`."""

    def synchronize(self, event: Any) -> None:
        """Block the calling thread until `event` has happened."""

    def close(self) -> None:
        """Give everything back; may be called again."""
        if id(self) in self._open:
            self._open.remove(id(self))
            if not self._open:
                sys.setswitchinterval(self._switch_seconds)


def copy_bytes(source: torch.Tensor, target: torch.Tensor) -> None:
    """RAM to RAM in the calling thread alone: torch's own copy takes all cores from compute."""
    if source.dtype is target.dtype and source.is_contiguous() and target.is_contiguous():
        # Not through numpy, which forbids for good to resize a storage that it has seen.
        assert source.nbytes == target.nbytes
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source)


def move(source: Source, target: Target) -> None:
    """Copy bytes between RAM and the offload file, synchronously."""
    if isinstance(target, FileExtent):
        assert isinstance(source, torch.Tensor)
        target.file.write(target.offset, source)
    elif isinstance(target, ScatteredRows):
        assert isinstance(source, torch.Tensor)
        target.scatter(source)
    elif isinstance(source, TensorRows):
        source.gather(target)
    elif isinstance(source, torch.Tensor):
        copy_bytes(source, target)
    else:
        source.read_into(target)
