"""Pages of the sequences in a micro-batch, and what of them comes from DISK and goes there."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class SpanPages:
    """One span: its first row, positions `start` to `end`, and the pages it has in one pool."""

    row: int
    start: int
    end: int
    pages: Sequence[int]
    indices: Sequence[int]
    """Ascending places in the sequence's table; none is beyond `end`."""
    newest: bool = True
    """The page of the last position is among them."""
    tail: int | None = None
    crosses: bool = False
    """Its rows are in more pages than are in the pool: they are a chunk, however few."""

    @property
    def count(self) -> int:
        """Rows."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Run:
    """`count` neighbouring pages on DISK, from `page` on, at neighbouring `place`s in staging."""

    page: int
    place: int
    count: int


@dataclass(frozen=True, slots=True)
class DiskMoves:
    """How the pages of a micro-batch come from DISK and get there.

    Staging holds [full pages | the last pages that were not full | fresh pages]. Only full pages
    are on DISK; each sequence's last one waits in RAM, at its *tail*, until it is full, too.
    """

    read: list[Run]
    """The full pages."""
    tails: torch.Tensor
    """Tails of the pages that are not full."""
    written: list[Run]
    """Pages that this sweep's rows complete."""
    kept_tails: torch.Tensor
    """Tails of the pages that are not full after this sweep, …"""
    kept_places: torch.Tensor
    """… and the places in staging of these pages."""
    num_full: int
    """Pages that come from DISK; from this place on, staging changes in this sweep."""


def held(span: SpanPages, page_tokens: int) -> tuple[int, int]:
    """Pages that are full before this sweep, and those that are not but have tokens (0 or 1)."""
    full = bisect_left(span.indices, span.start // page_tokens)
    begun = span.start % page_tokens > 0 and full < len(span.indices)
    return full, int(begun and span.indices[full] == span.start // page_tokens)


def disk_moves(
    spans: Sequence[SpanPages], staged: Sequence[SpanPages], page_tokens: int
) -> DiskMoves:
    """Between the pages of `spans` at home and their places in staging."""
    read: list[tuple[int, int]] = []
    written: list[tuple[int, int]] = []
    kept: list[tuple[int, int]] = []
    tails: list[int] = []
    for span, there in zip(spans, staged):
        pairs = list(zip(span.pages, there.pages))
        full, begun = held(span, page_tokens)
        complete = bisect_left(span.indices, span.end // page_tokens)
        read += pairs[:full]
        written += pairs[full:complete]
        if begun:
            assert span.tail is not None
            tails.append(span.tail)
        if complete < len(pairs):
            assert span.tail is not None
            kept.append((span.tail, there.pages[complete]))
    kept_tails, kept_places = torch.tensor(kept, dtype=torch.long).view(-1, 2).T
    from_tails = torch.tensor(tails, dtype=torch.long)
    return DiskMoves(_runs(read), from_tails, _runs(written), kept_tails, kept_places, len(read))


def _runs(pairs: Sequence[tuple[int, int]]) -> list[Run]:
    """What can be read or written at once, of pairs (page, place)."""
    runs: list[Run] = []
    for page, place in sorted(pairs, key=lambda pair: pair[1]):
        last = runs[-1] if runs else Run(-2, -2, 0)
        if (page, place) == (last.page + last.count, last.place + last.count):
            runs[-1] = Run(last.page, last.place, last.count + 1)
        else:
            runs.append(Run(page, place, 1))
    return runs
