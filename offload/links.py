"""Links between tiers and the spans of bytes that cross them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import torch

from offload.errors import OffloadStoreError

if TYPE_CHECKING:
    from offload.direct_file import DirectFile


class Link(str, Enum):
    """A path of bytes from one tier to another; each has one queue and one set of counters."""

    DISK_TO_HOST = "disk->host"
    HOST_TO_DEVICE = "host->device"
    DEVICE_TO_HOST = "device->host"
    HOST_TO_DISK = "host->disk"
    DISK_TO_DEVICE = "disk->device"
    """Only where the device computes in RAM, so that a read lands where it is used."""

    __str__ = str.__str__


@dataclass(frozen=True, slots=True)
class FileExtent:
    """`nbytes` of a file from `offset` on."""

    file: DirectFile
    offset: int
    nbytes: int

    def read_into(self, target: torch.Tensor) -> None:
        """Fill the contiguous uint8 tensor `target` of `nbytes` bytes."""
        self.file.read(self.offset, target)


@dataclass(frozen=True, slots=True)
class FileRows:
    """Rows `indices` (int64, sorted or not) of a table stored row by row in a file."""

    table: FileExtent
    row_bytes: int
    indices: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.row_bytes * len(self.indices)

    def read_into(self, target: torch.Tensor) -> None:
        """Fill `target` [len(indices), row_bytes] uint8."""
        for row, index in zip(target.view(-1, self.row_bytes), self.indices.tolist()):
            self.table.file.read(self.table.offset + index * self.row_bytes, row)


@dataclass(frozen=True, slots=True)
class TensorRows:
    """Rows `indices` of a RAM tensor; `staging` (pinned, at least as large) makes them one copy."""

    table: torch.Tensor
    indices: torch.Tensor
    staging: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return len(self.indices) * self.table[0].nbytes if len(self.indices) else 0

    def gather(self, out: torch.Tensor) -> None:
        """Write the rows to `out` [len(indices), *row], in this thread alone."""
        # torch would start a team of threads of its own in every link's thread.
        table, target = (each.view(torch.uint8).numpy() for each in (self.table, out))
        np.take(table, self.indices.numpy(), axis=0, out=target, mode="clip")


@dataclass(frozen=True, slots=True)
class PageSlots:
    """Token slots in KV pages in RAM, the target of newly computed keys and values.

    `keys` [pages, kv_heads, page_tokens, key_dim] and `values` are views of one page pool; row i of
    what arrives, keys and values side by side, goes to slot `offsets[i]` of page `pages[i]`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    staging: torch.Tensor | None = None

    def scatter(self, rows: torch.Tensor) -> None:
        """Store `rows` [n, kv_heads * (key_dim + value_dim)] in their slots."""
        _, heads, _, key_dim = self.keys.shape
        keys, values = rows[:, : heads * key_dim], rows[:, heads * key_dim :]
        self.keys[self.pages, :, self.offsets] = keys.reshape(-1, heads, key_dim)
        self.values[self.pages, :, self.offsets] = values.reshape(len(rows), heads, -1)


@dataclass(frozen=True, slots=True)
class SomeRows:
    """A table in RAM that takes some of the rows that arrive: row `chosen[i]` becomes `rows[i]`.

    All that arrives stays in `staging`, until the next copy that passes through it.
    """

    table: torch.Tensor
    rows: torch.Tensor
    chosen: torch.Tensor
    staging: torch.Tensor | None = None

    def scatter(self, arrived: torch.Tensor) -> None:
        """Store the chosen ones of `arrived` [n, *row], in this thread alone and without a copy."""
        table, source = (each.view(torch.uint8).numpy() for each in (self.table, arrived))
        for row, chosen in zip(self.rows.tolist(), self.chosen.tolist()):
            table[row] = source[chosen]


def io_error(error: OSError, what: str) -> OffloadStoreError:
    """The error of a failed operation on the offload file, with the next step."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OffloadStoreError(
        f"{what} failed: {reason}",
        hint="free space in the offload directory or choose another one with --offload-dir",
    )
