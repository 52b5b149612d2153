"""Links between tiers and the spans of bytes that cross them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload.direct_file import DirectFile
    from offload.paged_kv import PagedKV, TokenSlots


class Link(str, Enum):
    """A path of bytes from one tier to another; each has one queue and one set of counters."""

    DISK_TO_HOST = "disk->host"
    HOST_TO_DEVICE = "host->device"
    DEVICE_TO_HOST = "device->host"
    HOST_TO_DISK = "host->disk"
    DISK_TO_DEVICE = "disk->device"
    """Only where the device computes in RAM, so that a read lands where it is used."""
    HOST_ATTENTION = "host attention"
    """No path, but a queue like theirs: the processor attends to pages on HOST."""

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
        return len(self.indices) * (self.table.nbytes // len(self.table))

    def gather(self, out: torch.Tensor) -> None:
        """Write the rows to `out` [len(indices), *row], in this thread alone."""
        # torch would start a team of threads of its own in every link's thread.
        table, target = (each.view(torch.uint8).numpy() for each in (self.table, out))
        np.take(table, self.indices.numpy(), axis=0, out=target, mode="clip")


@dataclass(frozen=True, slots=True)
class HostWork:
    """Work of the processor that reads `nbytes` of RAM, queued like a copy."""

    run: Callable[[], None]
    nbytes: int


class ScatteredRows(ABC):
    """A target in RAM that rows are scattered to once they have arrived in `staging` (pinned).

    Without `staging` they can only come from RAM.
    """

    __slots__ = ()
    staging: torch.Tensor | None

    @abstractmethod
    def scatter(self, rows: torch.Tensor) -> None:
        """Store `rows` where they belong, in this thread alone."""


@dataclass(frozen=True, slots=True)
class PageSlots(ScatteredRows):
    """Token slots in KV pages, the target of newly computed keys and values."""

    pool: PagedKV
    slots: TokenSlots
    staging: torch.Tensor | None = None

    def scatter(self, rows: torch.Tensor) -> None:
        """Store `rows`, packed keys and values."""
        pool = self.pool
        if pool.table is None:
            pool.store(self.slots, rows)
            return
        # As `store` does, but with torch each link's thread would start a team of its own.
        _, kv_heads, page_tokens, _ = pool.keys.shape
        table, source = (each.view(torch.uint8).numpy() for each in (pool.table, rows))
        table[self.slots.rows(kv_heads, page_tokens).numpy()] = source


@dataclass(frozen=True, slots=True)
class SomeRows(ScatteredRows):
    """A table that takes some of the rows that arrive: row `chosen[i]` becomes its row `places[i]`.

    All that arrives stays in `staging`, until the next copy that passes through it.
    """

    table: torch.Tensor
    places: torch.Tensor
    chosen: torch.Tensor
    staging: torch.Tensor | None = None

    def scatter(self, rows: torch.Tensor) -> None:
        """Store the chosen ones of `rows` [n, *row] without a copy between."""
        table, source = (each.view(torch.uint8).numpy() for each in (self.table, rows))
        for place, chosen in zip(self.places.tolist(), self.chosen.tolist()):
            table[place] = source[chosen]
