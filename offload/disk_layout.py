"""How weights that lie on disk are read: runs of whole blocks, and where they land (no torch).

Weights that are neighbours in a file are one segment, so that they are one read, and the gap
between two is read along where that is cheaper than another request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.tiers import CACHE_LINE, DISK_BLOCK, padded

if TYPE_CHECKING:
    from collections.abc import Sequence

ALIGNMENT = 16
"""Of weights in GPU memory."""
GAP = 64 * 1024
"""Most bytes between two weights that are read along."""


@dataclass(frozen=True, order=True, slots=True)
class DiskPlace:
    """The bytes of one weight in a file."""

    file: str
    offset: int
    nbytes: int
    block: int
    """Reads of this file start and end at multiples of it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One run of blocks, and where in the slab it goes."""

    file: str
    offset: int
    nbytes: int
    at: int
    padding: int
    """Bytes of it that are no weights."""


@dataclass(frozen=True, slots=True)
class SlabLayout:
    """A buffer that holds weights as they lie on disk."""

    segments: tuple[Segment, ...]
    offsets: tuple[int, ...]
    """In the buffer, of each place, in the order that they were given in."""
    nbytes: int


def lay_out(places: Sequence[DiskPlace], *, shifted: bool = False) -> SlabLayout:
    """Segments that hold all of `places`, each once.

    A segment starts on a block of the slab, as direct reads into it want. If they go elsewhere
    first, it is `shifted` so that its first weight starts on a multiple of 16 bytes, as GPU
    kernels want: the tensors of a safetensors file start on multiples of 8.
    """
    runs: list[list[int]] = []
    for index in sorted(range(len(places)), key=lambda i: places[i]):
        place = places[index]
        if runs and _joins(places[runs[-1][-1]], place):
            runs[-1].append(index)
        else:
            runs.append([index])
    segments: list[Segment] = []
    offsets = [0] * len(places)
    end = 0
    for run in runs:
        first, last = places[run[0]], places[run[-1]]
        start = first.offset // first.block * first.block
        nbytes = padded(last.offset + last.nbytes, first.block) - start
        padding = nbytes - sum(places[index].nbytes for index in run)
        at = end + (-first.offset % ALIGNMENT if shifted else 0)
        segments.append(Segment(first.file, start, nbytes, at, padding))
        for index in run:
            offsets[index] = at + places[index].offset - start
        end = padded(at + nbytes, CACHE_LINE)
    return SlabLayout(tuple(segments), tuple(offsets), end)


def _joins(before: DiskPlace, place: DiskPlace) -> bool:
    return before.file == place.file and place.offset - (before.offset + before.nbytes) <= GAP


def kv_file_layout(page_bytes: Sequence[int], pages: int) -> tuple[list[int], int]:
    """Where each layer's pages start in the file, in bytes, and the size of the file."""
    starts, end = [], 0
    for size in page_bytes:
        starts.append(end)
        end += padded(pages * size, DISK_BLOCK)
    return starts, end
