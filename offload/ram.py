"""Plain RAM for slabs: page-aligned, of exact size, given back to the system when it is dropped."""

from __future__ import annotations

import contextlib
import mmap

import torch

_HUGE_PAGE = 2 * 2**20


def map_memory(nbytes: int, *, huge_pages: bool = True) -> torch.Tensor:
    """A uint8 tensor [nbytes] of zeros that starts on a page; pages are taken when first written.

    Huge pages are faster to fill, but memory that is used bit by bit takes more than it holds.
    Raises `OSError` where the system refuses.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    # Private: the system gives huge pages to no shared mapping.
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        mapping.madvise(mmap.MADV_DONTFORK)  # a fork must not move pages that a GPU reads
    if huge_pages and nbytes >= 2 * _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes)
