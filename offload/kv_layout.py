"""Where the rows of one micro-batch find their keys and values: made once per sweep.

Legend: B = decoding sequences, P = pages, n = rows, S = spans (rows of one sequence).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from offload.kv_moves import DiskMoves, SpanPages, disk_moves, held
from offload.paged_kv import TokenSlots
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_NO_INDEX = 1 << 40
"""Of a place in a padded table: beyond all positions."""


@dataclass(frozen=True, slots=True)
class PagedSpans:
    """Rows of S sequences, and the pages that they attend to. Integer tensors on the device."""

    first_row: torch.Tensor
    """[S] row of the micro-batch where the span starts."""
    num_rows: torch.Tensor
    """[S]"""
    first_position: torch.Tensor
    """[S] position of that row in its sequence."""
    table_start: torch.Tensor
    """[S + 1] where the span's pages start in `pages` and `indices`."""
    pages: torch.Tensor
    """[P] page numbers in the pool."""
    indices: torch.Tensor
    """[P] place of each page in its sequence's table: positions from index * page_tokens on."""
    most_rows: int
    """Of one span."""
    most_pages: int
    memo: dict[Any, Any] = field(default_factory=dict)
    """What attention derives from the spans alone: made in the first layer, used in all."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several rows of one sequence: positions from `start` on, at `rows` of the micro-batch."""

    rows: slice
    start: int
    pages: torch.Tensor
    """[P] pages with positions before `start`, …"""
    indices: torch.Tensor
    """… and their places in the sequence's table, …"""
    table: Sequence[int]
    """… which are known here, too."""
    positions: int
    """How many positions before `start` these pages have."""
    own: bool
    """The rows' own keys and values count here, too; the last pages are in this group."""

    @property
    def end(self) -> int:
        """Positions that are in the pages once the chunk is."""
        return self.start + self.rows.stop - self.rows.start


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Single rows of B sequences of similar length, padded to P pages."""

    rows: torch.Tensor
    """[B] row of each sequence in the micro-batch."""
    pages: torch.Tensor
    """[B, P]; unused places repeat a page of the sequence."""
    indices: torch.Tensor
    """[B, P] their places in the sequence's table; unused ones are beyond any."""
    lengths: torch.Tensor
    """[B] positions to attend to, the row's own included."""
    memo: dict[Any, torch.Tensor] = field(default_factory=dict)
    """What attention derives from the batch alone: made in the first layer, used in all."""


def _no_rows() -> torch.Tensor:
    return torch.empty(0, dtype=torch.long)


def _no_slots() -> TokenSlots:
    return TokenSlots(_no_rows(), _no_rows())


@dataclass(slots=True)
class KVGroup:
    """What a micro-batch has to do with the pages of one pool."""

    tier: Tier
    """Where the pages are at home."""
    staged: bool
    """The pages are copies in the staging pool of the device, made for this micro-batch."""
    page_tokens: int
    device: torch.device
    spans: list[SpanPages]
    """Those with pages here, by their numbers in the pool that attention reads."""
    gathered_tokens: int = 16384
    rows: torch.Tensor = field(default_factory=_no_rows)
    """[n] rows whose new keys and values go to these pages, …"""
    slots: TokenSlots = field(default_factory=_no_slots)
    """… and where."""
    home: TokenSlots | None = None
    """HOST pages only: the same slots in the HOST pool."""
    fetched: torch.Tensor = field(default_factory=_no_rows)
    """HOST pages only: those to copy to places 0, 1, … of the staging pool."""
    on_disk: DiskMoves | None = None
    """DISK pages only: what is read and written."""
    num_filled: int = 0
    """Places of the staging pool that are fetched, with tokens of earlier sweeps in them."""
    num_staged: int = 0
    """Places of the staging pool that the group uses; those after the fetched ones are fresh."""
    _memo: dict[Any, Any] = field(default_factory=dict)

    def chunks(self, fewest: int) -> list[Chunk]:
        """The spans of at least so many rows."""
        key = "chunks", fewest
        if key not in self._memo:
            chosen = [s for s in self.spans if s.count >= fewest or s.crosses]
            self._memo[key] = [self._chunk(span) for span in chosen]
        chunks: list[Chunk] = self._memo[key]
        return chunks

    def paged(self, below: int | None = None) -> PagedSpans | None:
        """The spans of fewer rows, or all of them; None where there are none."""
        key = "paged", below
        if key not in self._memo:
            chosen = [s for s in self.spans if below is None or (s.count < below and not s.crosses)]
            self._memo[key] = _paged_spans(chosen, self.device) if chosen else None
        spans: PagedSpans | None = self._memo[key]
        return spans

    def decodes(self) -> list[DecodeBatch]:
        """The spans of one row.

        A batch has at most `gathered_tokens` positions, padding included, if it has several
        sequences: that bounds the copy which attention makes of its keys and values.
        """
        if "decodes" not in self._memo:
            singles = [span for span in self.spans if span.count == 1]
            alike = _similar_lengths(singles, self.page_tokens, self.gathered_tokens)
            self._memo["decodes"] = [_decode_batch(batch, self.device) for batch in alike]
        batches: list[DecodeBatch] = self._memo["decodes"]
        return batches

    def _chunk(self, span: SpanPages) -> Chunk:
        # The page that the rows begin in may have earlier positions, too.
        full, begun = held(span, self.page_tokens)
        pages, table = list(span.pages[: full + begun]), list(span.indices[: full + begun])
        return Chunk(
            slice(span.row, span.row + span.count),
            span.start,
            torch.tensor(pages, dtype=torch.long, device=self.device),
            torch.tensor(table, dtype=torch.long, device=self.device),
            table,
            full * self.page_tokens + begun * (span.start % self.page_tokens),
            span.newest,
        )


def build_group(
    spans: Sequence[SpanPages],
    page_tokens: int,
    device: torch.device,
    tier: Tier,
    *,
    staged: bool,
    gathered_tokens: int = 16384,
) -> KVGroup:
    """What `spans` have on `tier`. Staged pages are renumbered: full, others in use, fresh."""
    group = KVGroup(tier, staged, page_tokens, device, list(spans), gathered_tokens)
    if staged:
        tables = _renumber(spans, page_tokens)
        group.spans = [replace(span, pages=table) for span, table in zip(spans, tables)]
        group.num_filled = sum(sum(held(span, page_tokens)) for span in spans)
        group.num_staged = sum(map(len, tables))
    # Few tensors for all rows: this runs between two sweeps, when nothing else does.
    new = [
        each for s, there in zip(spans, group.spans) for each in _new_rows(s, there, page_tokens)
    ]
    packed = torch.tensor(new, dtype=torch.long).view(-1, 4).T.contiguous()
    group.rows, pages, offsets = packed[:3].to(device)
    group.slots = TokenSlots(pages, offsets)
    if tier is Tier.DISK:
        group.on_disk = disk_moves(spans, group.spans, page_tokens)
    elif staged:
        group.home = TokenSlots(packed[3], packed[2])
        fetched = [0] * group.num_filled
        for span, there in zip(spans, group.spans):
            for place, page in zip(there.pages[: sum(held(span, page_tokens))], span.pages):
                fetched[place] = page
        group.fetched = torch.tensor(fetched, dtype=torch.long)
    return group


def _new_rows(
    span: SpanPages, there: SpanPages, page_tokens: int
) -> Iterator[tuple[int, int, int, int]]:
    """Row, page that attention reads, offset in it and page at home of every row stored here."""
    place = bisect_left(span.indices, span.start // page_tokens)
    for index, page, own in zip(span.indices[place:], there.pages[place:], span.pages[place:]):
        first = index * page_tokens
        for position in range(max(span.start, first), min(span.end, first + page_tokens)):
            yield span.row + position - span.start, page, position - first, own


def _renumber(spans: Sequence[SpanPages], page_tokens: int) -> list[list[int]]:
    kinds = [held(span, page_tokens) for span in spans]
    place, tail = 0, sum(full for full, _ in kinds)
    fresh = tail + sum(begun for _, begun in kinds)
    renumbered: list[list[int]] = []
    for span, (full, begun) in zip(spans, kinds):
        new = len(span.pages) - full - begun
        parts = range(place, place + full), range(tail, tail + begun), range(fresh, fresh + new)
        renumbered.append([each for part in parts for each in part])
        place, tail, fresh = place + full, tail + begun, fresh + new
    return renumbered


def _paged_spans(spans: Sequence[SpanPages], device: torch.device) -> PagedSpans:
    starts = list(accumulate((len(span.pages) for span in spans), initial=0))
    numbers = [
        *(span.row for span in spans),
        *(span.count for span in spans),
        *(span.start for span in spans),
        *starts,
        *(page for span in spans for page in span.pages),
        *(index for span in spans for index in span.indices),
    ]
    count, pages = len(spans), starts[-1]
    sizes = [count, count, count, count + 1, pages, pages]
    tensors = torch.tensor(numbers, dtype=torch.int32).to(device).split(sizes)
    row, rows, position, start, page, index = tensors
    most_pages = max(len(span.pages) for span in spans)
    most_rows = max(span.count for span in spans)
    return PagedSpans(row, rows, position, start, page, index, most_rows, most_pages)


def _similar_lengths(
    singles: Sequence[SpanPages], page_tokens: int, gathered_tokens: int
) -> list[list[SpanPages]]:
    """Batches in which the longest sequence has at most a quarter more pages than the shortest.

    Sequences come in order of length, so the newest one is a batch's longest so far.
    """
    batches: list[list[SpanPages]] = []
    for single in sorted(singles, key=lambda span: len(span.pages)):
        pages = len(single.pages)
        if batches:
            shortest = len(batches[-1][0].pages)
            tokens = pages * page_tokens * (len(batches[-1]) + 1)
        if not batches or pages > max(shortest * 1.25, shortest + 1) or tokens > gathered_tokens:
            batches.append([])
        batches[-1].append(single)
    return batches


def _decode_batch(batch: Sequence[SpanPages], device: torch.device) -> DecodeBatch:
    longest = max(len(span.pages) for span in batch)
    pages, indices = [], []
    for span in batch:
        missing = longest - len(span.pages)
        pages.append([*span.pages, *[span.pages[0]] * missing])
        indices.append([*span.indices, *[_NO_INDEX] * missing])
    return DecodeBatch(
        rows=torch.tensor([span.row for span in batch], device=device),
        pages=torch.tensor(pages, device=device),
        indices=torch.tensor(indices, device=device),
        lengths=torch.tensor([span.end for span in batch], device=device),
    )
