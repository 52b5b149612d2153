"""What the links of a machine do, with buffers and a file that are there for nothing else."""

from __future__ import annotations

import math
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from flexrun.measuring import Room, median_of
from offload.cut import cut
from offload.direct_file import DirectFile, file_error
from offload.links import FileExtent, Link
from offload.raw_speed import RawCopy, copy_until, raw_speeds, speed_together
from offload.tiers import DISK_BLOCK, Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from offload.backend import DeviceBackend

_PIECES = 8
"""Buffers of a link: more than copies under way."""
_FILE_BYTES = 1 << 30
"""Far more than a disk's own memory keeps, unless it is a large one."""
_REPEATS = 3
"""Times that a link is measured in its time."""
_PAGES = 64
_NAMES = {
    Link.HOST_TO_DEVICE: "host_to_device",
    Link.DEVICE_TO_HOST: "device_to_host",
    Link.DISK_TO_HOST: "disk_read",
    Link.DISK_TO_DEVICE: "disk_read",
    Link.HOST_TO_DISK: "disk_write",
}


class LinkCalibration(Room):
    """Buffers of all links, and the file, while it is entered.

    The file has no name: nothing is left of it however the process ends. Links that the budgets
    leave no room for have no copies and are not measured.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        directory: Path,
        page_bytes: int,
        links: Sequence[Link] | None = None,
    ) -> None:
        """`directory`: of the file; `page_bytes`: of one KV page of one layer; `links`: which ones
        have buffers, None: all.
        """
        super().__init__(backend)
        self._links = backend.links if links is None else links
        self._page_bytes = page_bytes
        self._ram = Tier.DEVICE if backend.unified else Tier.HOST
        self._sizes = {link: self._request_bytes(link) for link in self._links}
        self._directory = directory
        self._file: DirectFile | None = None
        self._copies: dict[Link, list[RawCopy]] = {}

    def _request_bytes(self, link: Link) -> int:
        """Of one buffer: a request, or less where half the memory is shared by all links."""
        rooms = [self.left(tier) for tier in self._tiers(link)]
        shared = min(rooms) // (2 * len(self._links) * _PIECES)
        return min(self.backend.request_bytes(link), shared) // DISK_BLOCK * DISK_BLOCK

    def _tiers(self, link: Link) -> list[Tier]:
        """Memories that a copy over `link` needs a buffer of."""
        both = link in (Link.HOST_TO_DEVICE, Link.DEVICE_TO_HOST)
        return [Tier.HOST, Tier.DEVICE] if both else [self._ram]

    def prepare(self, seconds: float) -> dict[str, float]:
        """Take the buffers, and write the file as far as that goes in `seconds`.

        What was never written would not be read from a disk. Raises `OffloadStoreError`.
        """
        written = self._write_file(seconds)
        for link, size in self._sizes.items():
            on_disk = link not in (Link.HOST_TO_DEVICE, Link.DEVICE_TO_HOST)
            if size and (written >= size or not on_disk):
                self._copies[link] = self._copies_of(link, size, written)
        self.callback(self._copies.clear)  # before the memory is given back
        return {}

    def _write_file(self, seconds: float) -> int:
        """Bytes that were written, at least of every buffer that may be read."""
        size = self._sizes.get(Link.HOST_TO_DISK, 0)
        nbytes = min(_FILE_BYTES, self.left(Tier.DISK) // 2) // DISK_BLOCK * DISK_BLOCK
        if not size or nbytes < size:
            return 0
        self._file = self._make_file(nbytes)
        buffer, written, start = self._buffers(self._ram, 1, size)[0], 0, time.perf_counter()
        while written + size <= nbytes:
            if written >= _PIECES * size and time.perf_counter() - start > seconds:
                break
            self._file.write(written, buffer)
            written += size
        return written

    def _make_file(self, nbytes: int) -> DirectFile:
        self.charge(Tier.DISK, nbytes)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise file_error(error, f"creating {self._directory}") from error
        path = self._directory / f"measured-{uuid.uuid4().hex}.bin"
        file = DirectFile.create(path, nbytes, nameless=True)
        self.callback(file.close)
        return file

    def _buffers(self, tier: Tier, count: int, size: int) -> list[torch.Tensor]:
        return list(self.take(tier, count * size).split(size))

    def _copies_of(self, link: Link, size: int, written: int) -> list[RawCopy]:
        buffers = [self._buffers(tier, _PIECES, size) for tier in self._tiers(link)]
        if len(buffers) == 2:
            sources, targets = buffers if link is Link.HOST_TO_DEVICE else reversed(buffers)
            return [RawCopy(*pair, number) for number, pair in enumerate(zip(sources, targets))]
        assert self._file is not None
        copies = []
        for number, start in enumerate(range(0, written - size + 1, size)):
            place = number % _PIECES
            extent, buffer = FileExtent(self._file, start, size), buffers[0][place]
            writes = link is Link.HOST_TO_DISK
            sides = (buffer, extent) if writes else (extent, buffer)
            copies.append(RawCopy(sides[0], sides[1], place))
        return copies

    def alone(self, link: Link, seconds: float) -> dict[str, float]:
        """Bytes per second of one link when nothing else runs."""
        copies = self._copies.get(link)
        return {_NAMES[link]: self._median(link, copies, seconds) if copies else math.inf}

    def _median(self, link: Link, copies: list[RawCopy], seconds: float) -> float:
        each = seconds / _REPEATS * 2 / 3  # a third is not counted

        def measure(turn: int) -> float:
            # Each time from another place on: not what has just been read.
            first = turn * len(copies) // _REPEATS % len(copies)
            pieces = copies[first:] + copies[:first]
            return raw_speeds(self.backend, [(link, pieces)], each)[link]

        return median_of(measure, seconds)

    def together(self, seconds: float) -> dict[str, float]:
        """Bytes per second in sum, while all links copy."""
        copies = dict(self._copies)
        if Link.HOST_TO_DISK in copies and len(copies[Link.HOST_TO_DISK]) > 1:
            # Written elsewhere than read: requests for the same blocks wait for each other.
            writes = copies[Link.HOST_TO_DISK]
            copies[Link.HOST_TO_DISK] = writes[len(writes) // 2 :]
            reads = copies.get(self.backend.disk_in, [])
            copies[self.backend.disk_in] = reads[: (len(reads) + 1) // 2]
        pairs = [(link, pieces) for link, pieces in copies.items() if pieces]
        if not pairs:
            return {"links_together": math.inf}
        each = seconds / _REPEATS * 2 / 3
        speed = median_of(lambda _: speed_together(self.backend, pairs, each), seconds)
        return {"links_together": speed}

    def beside(self, link: Link, call: Callable[[], float]) -> tuple[float, float]:
        """Bytes per second of `link` while `call` runs, and what that gives; 0 without copies."""
        pieces = self._copies.get(link)
        if not pieces:
            return 0.0, call()
        over = threading.Event()
        with ThreadPoolExecutor(1, "flexrun measuring a link") as thread:
            copying = thread.submit(copy_until, self.backend, link, pieces, over)
            try:
                found = call()
            finally:
                over.set()
        return copying.result(), found

    def pages(self, seconds: float) -> dict[str, float]:
        """Bytes per second of KV pages, one by one, to the tier of sequences that wait."""
        link = Link.HOST_TO_DISK if self.backend.unified else Link.DEVICE_TO_HOST
        pieces = self._copies.get(link, [])
        pages = (pair for p in pieces for pair in cut(p.source, p.target, self._page_bytes))
        copies = [RawCopy(*pair, number) for number, pair in enumerate(pages)]
        speed = self._median(link, copies[:_PAGES], seconds) if copies else math.inf
        return {"swap": speed}
