"""Where every tensor lies in a prepared file, known ahead of time (no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from offload.tiers import CACHE_LINE, padded

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FOLDER = "flexrun-prepared"
"""In the offload directory."""
WEIGHTS, UNFINISHED = "weights.bin", ".tmp"
"""A store's largest file, and the end of its directory's name until it is whole."""
PREPARED_BLOCK = 16 * 2**10
"""Units start on it, requests are multiples of it, and each has a checksum of its own."""


class SizedTensor(Protocol):
    """A stored tensor, as far as its place is concerned."""

    @property
    def name(self) -> str:
        """Its name in the model."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes it takes as stored."""
        ...


def layout(units: Sequence[Sequence[SizedTensor]]) -> tuple[dict[str, int], int]:
    """The offset of every tensor, in the order of the units, and the size of the file."""
    offsets: dict[str, int] = {}
    end = 0
    for unit in units:
        for tensor in unit:
            assert tensor.name not in offsets, f"{tensor.name} is in two units"
            offsets[tensor.name] = end
            end += padded(tensor.nbytes, CACHE_LINE)
        end = padded(end, PREPARED_BLOCK)
    return offsets, end


def unit_ends(units: Sequence[Sequence[SizedTensor]]) -> list[int]:
    """Where each unit ends, and the next one starts."""
    return [layout(units[: number + 1])[1] for number in range(len(units))]


def unfinished_bytes(directory: Path) -> int:
    """That stores which are not whole take of the offload directory."""
    files = directory.glob(f"{FOLDER}/*{UNFINISHED}*/{WEIGHTS}")
    return sum(file.stat().st_blocks * 512 for file in files)


def prepared_bytes(units: Sequence[Sequence[SizedTensor]]) -> int:
    """Exact size of the prepared file; checksums and index are another 0.05 % of it."""
    return layout(units)[1]
