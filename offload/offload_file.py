"""The file that is the DISK tier: allocated up front, gone when the process ends."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from offload.errors import OffloadStoreError
from offload.links import FileExtent, io_error
from offload.tiers import DISK_BLOCK, padded

if TYPE_CHECKING:
    import torch

REQUEST_BYTES = 16 * 2**20
"""Largest single read or write."""


class OffloadFile:
    """An unnamed file of `nbytes` in `directory`; the kernel frees it however the process ends.

    Raises `OffloadStoreError` if the directory cannot be written or has not the space.
    """

    def __init__(self, directory: Path, nbytes: int) -> None:
        self._end = 0
        self.nbytes = nbytes
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(  # noqa: SIM115  (open for the life of the store)
                dir=directory, prefix="flexrun-", buffering=0
            )
        except OSError as error:
            raise io_error(error, f"creating an offload file in {directory}") from error
        try:
            # Space is taken now, so that a full disk is an error before any weight is read.
            if nbytes:
                os.posix_fallocate(self._file.fileno(), 0, nbytes)
        except OSError as error:
            self._file.close()
            raise io_error(error, f"reserving {nbytes} bytes in {directory}") from error

    def extent(self, nbytes: int) -> FileExtent:
        """The next free, aligned extent of `nbytes`."""
        extent = FileExtent(self, self._end, nbytes)
        self._end += padded(nbytes, DISK_BLOCK)
        return extent

    def read(self, offset: int, target: torch.Tensor) -> None:
        """Fill the contiguous uint8 tensor `target` from `offset` on."""
        self._all(os.preadv, offset, target, "reading from the offload file")

    def write(self, offset: int, source: torch.Tensor) -> None:
        """Write the contiguous uint8 tensor `source` at `offset`."""
        self._all(os.pwritev, offset, source, "writing to the offload file")

    def _all(self, call, offset: int, tensor: torch.Tensor, what: str) -> None:  # type: ignore[no-untyped-def]
        view = memoryview(tensor.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
        done = 0
        while done < len(view):
            try:
                count = call(
                    self._file.fileno(), [view[done : done + REQUEST_BYTES]], offset + done
                )
            except OSError as error:
                raise io_error(error, what) from error
            if count == 0:
                raise OffloadStoreError(
                    f"{what} stopped after {done} of {len(view)} bytes",
                    hint="check the disk of the offload directory (--offload-dir)",
                )
            done += count

    def close(self) -> None:
        """Give the space back."""
        self._file.close()
