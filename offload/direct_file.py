"""Positional, thread-safe reads and writes of one file, past the page cache (O_DIRECT).

The page cache would take memory that the job needs, and copying out of it costs more processor time
than a fast disk leaves.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
from typing import TYPE_CHECKING

import torch

from offload.errors import OffloadStoreError
from offload.tiers import DISK_BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FREE_SPACE = "free space in the offload directory or choose another one with --offload-dir"
_CHECK_DISK = (
    "check the disk (the system's log, dmesg, has its errors) and leave the file in place during "
    "a job; another offload directory is chosen with --offload-dir"
)
_warned = False
_warning = threading.Lock()


class DirectFile:
    """One open file. Threads may read and write it at the same time, each its own bytes.

    Offset, length and address of a request should be multiples of 4096; others are served, too, but
    through the page cache. Raises `OffloadStoreError`.
    """

    block: int = DISK_BLOCK
    """Callers round offsets and lengths to multiples of it."""

    def __init__(
        self,
        path: Path,
        nbytes: int | None = None,
        *,
        nameless: bool = False,
        writable: bool = False,
    ) -> None:
        """Open the file to read it, or to write it, too; or create it with `nbytes` reserved."""
        self.path = path
        self._access = os.O_RDONLY if nbytes is None and not writable else os.O_RDWR
        self._lock = threading.Lock()
        self._past_cache: int | None = None
        self._cached: int | None = None
        try:
            if nbytes is None:
                self._open_existing()
            else:
                self._create(nbytes, nameless)
            status = os.fstat(self._any())
            if not stat.S_ISREG(status.st_mode):
                raise OffloadStoreError(f"{path} is not a file", hint=_CHECK_DISK)
        except BaseException:
            self.close()
            raise
        self.size: int = status.st_size
        """When it was opened."""
        self._modified = status.st_mtime_ns
        self.direct: bool = self._past_cache is not None
        """Requests go past the page cache."""
        if not self.direct:
            _warn_once(path)

    @staticmethod
    def open(path: Path) -> DirectFile:
        """An existing file, to be read."""
        return DirectFile(path)

    @staticmethod
    def reopen(path: Path) -> DirectFile:
        """An existing file, to be read and written."""
        return DirectFile(path, writable=True)

    @staticmethod
    def create(path: Path, nbytes: int, *, nameless: bool = False) -> DirectFile:
        """A new file of `nbytes`, all of them reserved: a full disk is an error now, not later.

        A `nameless` one is unlinked before it takes space: nothing is left of it when it is closed,
        or when the process is killed.
        """
        return DirectFile(path, nbytes, nameless=nameless)

    def _open_existing(self) -> None:
        try:
            self._past_cache = _open_direct(str(self.path), self._access)
            if self._past_cache is None:
                self._cached = os.open(self.path, self._access)
        except OSError as error:
            raise file_error(error, f"opening {self.path}") from error

    def _create(self, nbytes: int, nameless: bool) -> None:
        try:
            self._cached = os.open(self.path, self._access | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise file_error(error, f"creating {self.path}") from error
        try:
            if nameless:
                os.unlink(self.path)
            if nbytes:
                # Where the file system cannot reserve, the C library writes a byte into every
                # block, which O_DIRECT would refuse: hence the other descriptor.
                os.posix_fallocate(self._cached, 0, nbytes)
            self._past_cache = _open_direct(_same_file(self._cached), self._access)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            raise file_error(error, f"reserving {nbytes} bytes in {self.path.parent}") from error

    def read(self, offset: int, target: torch.Tensor) -> None:
        """Fill the contiguous uint8 tensor `target` from byte `offset` on.

        What of it lies beyond `size` is left as it is: a last block may be read whole.
        """
        nbytes = max(0, min(target.nbytes, self.size - offset))
        self._move(os.preadv, offset, target, nbytes, "reading")

    def write(self, offset: int, source: torch.Tensor) -> None:
        """Write the contiguous uint8 tensor `source` at byte `offset`."""
        assert offset + source.nbytes <= self.size, "space is reserved when the file is created"
        self._move(os.pwritev, offset, source, source.nbytes, "writing")

    def _move(
        self,
        call: Callable[[int, list[memoryview], int], int],
        offset: int,
        tensor: torch.Tensor,
        nbytes: int,
        what: str,
    ) -> None:
        assert tensor.dtype is torch.uint8
        assert tensor.is_contiguous()
        view = memoryview(tensor.view(-1).numpy())  # type: ignore[arg-type]  # numpy: a buffer
        address, done = tensor.data_ptr(), 0
        while done < nbytes:
            place = offset + done
            try:
                count = None
                if self.direct and not (address + done | place | len(view) - done) % DISK_BLOCK:
                    count = self._past_the_cache(call, view[done:], place)
                if count is None:
                    count = self._through_the_cache(call, view[done:nbytes], place)
            except OSError as error:
                raise file_error(error, f"{what} {self.path} at byte {place}") from error
            if not count:
                raise OffloadStoreError(
                    f"{what} {self.path} stopped at byte {place}: the file had {self.size} bytes "
                    "when it was opened and has become shorter",
                    hint="leave the file in place during a job; restore it and run the same "
                    "command again",
                )
            done += count

    def _past_the_cache(
        self, call: Callable[[int, list[memoryview], int], int], view: memoryview, offset: int
    ) -> int | None:
        """Bytes moved; None if the file system turns out to refuse direct requests."""
        assert self._past_cache is not None, f"{self.path} is closed"
        try:
            return call(self._past_cache, [view], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        self.direct = False
        _warn_once(self.path)
        return None

    def _through_the_cache(
        self, call: Callable[[int, list[memoryview], int], int], view: memoryview, offset: int
    ) -> int:
        descriptor = self._buffered()
        count = call(descriptor, [view], offset)
        if not self.direct:
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def _buffered(self) -> int:
        with self._lock:
            if self._cached is None:
                # Not by its name, which may be another file's by now.
                self._cached = os.open(_same_file(self._any()), self._access)
            return self._cached

    def _any(self) -> int:
        descriptor = self._cached if self._past_cache is None else self._past_cache
        assert descriptor is not None, f"{self.path} is closed"
        return descriptor

    def sync(self) -> None:
        """Return when all that was written would survive a power cut."""
        try:
            os.fsync(self._any())
            if not self.direct:  # only pages that are written out can be dropped
                os.posix_fadvise(self._buffered(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise file_error(error, f"writing {self.path}") from error

    def check_unchanged(self) -> None:
        """Raise `OffloadStoreError` if someone else changed the file since it was opened.

        A file that was replaced by another of its name is still the one that was opened.
        """
        status = os.fstat(self._any())
        theirs = self._access == os.O_RDONLY  # our own writes change the time, too
        if status.st_size != self.size or (theirs and status.st_mtime_ns != self._modified):
            raise OffloadStoreError(
                f"{self.path} was changed while a job was reading it: it had {self.size} bytes "
                f"when it was opened and has {status.st_size} now, with another time stamp",
                hint="results since that change may be wrong: leave the file in place during a "
                "job, restore it, and start the job again with a new --output",
            )

    def close(self) -> None:
        """Give the descriptors back; a second call does nothing."""
        with self._lock:
            open_ones = [self._past_cache, self._cached]
            self._past_cache = self._cached = None
        for descriptor in open_ones:
            if descriptor is not None:
                os.close(descriptor)


def file_error(error: OSError, what: str) -> OffloadStoreError:
    """The error of a failed system call, with the next step."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    hint = _FREE_SPACE if error.errno in _FULL else _CHECK_DISK
    return OffloadStoreError(f"{what} failed: {reason}", hint)


def _open_direct(path: str, access: int) -> int | None:
    try:
        return os.open(path, access | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _same_file(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _warn_once(path: Path) -> None:
    global _warned
    with _warning:
        if _warned:
            return
        _warned = True
    logger.warning(
        "%s: this file system refuses direct I/O (O_DIRECT), so files are read through the page "
        "cache, which is slower and takes memory; a local disk (--offload-dir) is better",
        path,
    )
