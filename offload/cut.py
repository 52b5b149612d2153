"""Copies cut into the requests in which links are shared."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from offload.links import FileExtent, FileRows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from offload.backend import Source, Target

ROWS_PER_REQUEST = 16
"""Of a table on disk, whose rows are read one by one."""


def cut(source: Source, target: Target, size: int) -> Iterator[tuple[Source, Target]]:
    """Plain copies in pieces of `size` bytes, many rows of a file in some; others as they are."""
    if isinstance(source, FileRows) and isinstance(target, torch.Tensor):
        yield from _row_requests(source, target)
    elif not (_is_plain(source) and _is_plain(target)) or source.nbytes <= size:
        yield source, target
    else:
        for start in range(0, source.nbytes, size):
            yield _piece(source, start, size), _piece(target, start, size)


def _is_plain(side: Source | Target) -> bool:
    flat = isinstance(side, torch.Tensor) and side.dtype is torch.uint8 and side.dim() == 1
    return flat or isinstance(side, FileExtent)


def _row_requests(source: FileRows, target: torch.Tensor) -> Iterator[tuple[Source, Target]]:
    """Rows lie apart on the disk: what counts is how many reads are under way."""
    rows = target.view(-1, source.row_bytes)
    for start in range(0, len(source.indices), ROWS_PER_REQUEST):
        places = slice(start, start + ROWS_PER_REQUEST)
        yield replace(source, indices=source.indices[places]), rows[places]


def _piece(whole: Any, start: int, size: int) -> Any:
    if isinstance(whole, FileExtent):
        nbytes = min(size, whole.nbytes - start)
        return FileExtent(whole.file, whole.offset + start, nbytes)
    return whole[start : start + size]
