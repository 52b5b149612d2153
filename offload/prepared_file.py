"""A file with a checksum for every block, each verified the first time it is read."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from offload.direct_file import DirectFile
from offload.errors import OffloadStoreError
from offload.prepared_layout import PREPARED_BLOCK
from offload.ram import map_memory
from offload.tiers import padded

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def block_checksums(data: memoryview) -> list[int]:
    """Of each whole block in `data`."""
    last = len(data) - PREPARED_BLOCK
    return [
        xxhash.xxh3_64_intdigest(data[start : start + PREPARED_BLOCK])
        for start in range(0, last + 1, PREPARED_BLOCK)
    ]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    data = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(data)  # type: ignore[arg-type]  # numpy arrays are buffers


class PreparedFile(DirectFile):
    """`weights.bin` of a prepared store. Raises `OffloadStoreError` where it is damaged."""

    block = PREPARED_BLOCK

    def __init__(self, path: Path, checksums: NDArray[np.uint64]) -> None:
        super().__init__(path)
        self._checksums = checksums
        self._verified = np.zeros(len(checksums), dtype=np.bool_)

    def read(self, offset: int, target: torch.Tensor) -> None:
        """Fill `target`; blocks that this process reads for the first time are verified."""
        end = min(offset + target.nbytes, self.size)
        blocks = slice(offset // self.block, -(-end // self.block))
        if self._verified[blocks].all():
            super().read(offset, target)
            return
        inner = (padded(offset, self.block), end // self.block * self.block)
        cuts = {offset, end, *(cut for cut in inner if offset < cut < end)}
        for start, stop in pairwise(sorted(cuts)):
            part = target[start - offset : stop - offset]
            if start % self.block or stop % self.block:
                self._read_part(start, part)
            else:
                super().read(start, part)
                self._verify(start, part)

    def _read_part(self, offset: int, target: torch.Tensor) -> None:
        """Fill `target` with bytes of a single block, which has to be read whole to be verified."""
        start = offset // self.block * self.block
        whole = map_memory(self.block)
        super().read(start, whole)
        self._verify(start, whole)
        target.copy_(whole[offset - start :][: target.nbytes])

    def _verify(self, start: int, data: torch.Tensor) -> None:
        first = start // self.block
        found = np.array(block_checksums(as_bytes(data)), dtype=np.uint64)
        blocks = slice(first, first + len(found))
        wrong = np.flatnonzero(found != self._checksums[blocks])
        if wrong.size:
            at = (first + int(wrong[0])) * self.block
            raise OffloadStoreError(
                f"{self.path} is damaged: {wrong.size} of {len(found)} blocks read do not match "
                f"their checksums, the first of them at byte {at}",
                hint=f"delete {self.path.parent}: the next run writes it again; if it happens "
                "again, check the disk and the memory of this machine",
            )
        self._verified[blocks] = True
