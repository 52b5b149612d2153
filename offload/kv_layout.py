"""Where the rows of one micro-batch find their keys and values: index tensors, made once per sweep.

Legend: B = decoding sequences, P = pages, n = rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from offload.paged_kv import TokenSlots
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several rows of one sequence: positions from `start` on, at `rows` of the micro-batch."""

    rows: slice
    start: int
    pages: torch.Tensor
    """[P] pages of positions 0 to the chunk's end."""

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
    lengths: torch.Tensor
    """[B] positions to attend to, the row's own included."""
    memo: dict[Any, torch.Tensor] = field(default_factory=dict)
    """What attention derives from the batch alone: made in the first layer, used in all."""


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


def _no_rows() -> torch.Tensor:
    return torch.empty(0, dtype=torch.long)


def _no_slots() -> TokenSlots:
    return TokenSlots(_no_rows(), _no_rows())


@dataclass(slots=True)
class KVGroup:
    """The rows of a micro-batch whose pages lie in one pool."""

    tier: Tier
    """Where the pages are at home."""
    staged: bool
    """The pages are copies in the staging pool of the device, made for this micro-batch."""
    chunks: list[Chunk] = field(default_factory=list)
    decodes: list[DecodeBatch] = field(default_factory=list)
    rows: torch.Tensor = field(default_factory=_no_rows)
    """[n] all rows of the group."""
    slots: TokenSlots = field(default_factory=_no_slots)
    """Where the new keys and values of these rows go."""
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


@dataclass(frozen=True, slots=True)
class SpanPages:
    """One span of the micro-batch: its first row, positions `start` to `end`, its page table."""

    row: int
    start: int
    end: int
    pages: Sequence[int]
    tail: int | None = None


def build_group(
    spans: Sequence[SpanPages],
    page_tokens: int,
    device: torch.device,
    tier: Tier,
    *,
    staged: bool,
    gathered_tokens: int = 16384,
) -> KVGroup:
    """Index tensors of `spans`. Staged pages are renumbered: full ones, others with content, fresh.

    A decode batch has at most `gathered_tokens` positions, padding included, if it has several
    sequences: that bounds the copy which attention makes of its keys and values.
    """
    group = KVGroup(tier, staged=staged)
    tables: list[Sequence[int]] = [span.pages[: -(-span.end // page_tokens)] for span in spans]
    home = tables
    if staged:
        tables = _renumber(spans, home, page_tokens)
        group.num_filled = sum(-(-span.start // page_tokens) for span in spans)
        group.num_staged = sum(map(len, tables))
    rows: list[int] = []
    pages: list[int] = []
    home_pages: list[int] = []
    offsets: list[int] = []
    for span, table, own in zip(spans, tables, home):
        count = span.end - span.start
        rows += range(span.row, span.row + count)
        for position in range(span.start, span.end):
            page, offset = divmod(position, page_tokens)
            pages.append(table[page])
            home_pages.append(own[page])
            offsets.append(offset)
        if count > 1:
            place = slice(span.row, span.row + count)
            group.chunks.append(Chunk(place, span.start, torch.tensor(table, device=device)))
    # Few tensors for all rows: this runs between two sweeps, when nothing else does.
    packed = torch.tensor([rows, pages, offsets])
    group.rows, *slots = packed.to(device)
    group.slots = TokenSlots(*slots)
    if tier is Tier.DISK:
        group.on_disk = _disk_moves(spans, home, tables, page_tokens)
    elif staged:
        group.home = TokenSlots(torch.tensor(home_pages), packed[2])
        fetched = [0] * group.num_filled
        for span, table, own in zip(spans, tables, home):
            for page, there in zip(own[: -(-span.start // page_tokens)], table):
                fetched[there] = page
        group.fetched = torch.tensor(fetched, dtype=torch.long)
    singles = [(s, t) for s, t in zip(spans, tables) if s.end - s.start == 1]
    group.decodes = [
        _decode_batch(batch, device)
        for batch in _similar_lengths(singles, page_tokens, gathered_tokens)
    ]
    return group


def _renumber(
    spans: Sequence[SpanPages], tables: Sequence[Sequence[int]], page_tokens: int
) -> list[Sequence[int]]:
    full = [span.start // page_tokens for span in spans]
    begun = [int(span.start % page_tokens > 0) for span in spans]
    place, tail, fresh = 0, sum(full), sum(full) + sum(begun)
    renumbered: list[Sequence[int]] = []
    for table, old, last in zip(tables, full, begun):
        new = len(table) - old - last
        parts = range(place, place + old), range(tail, tail + last), range(fresh, fresh + new)
        renumbered.append([each for part in parts for each in part])
        place, tail, fresh = place + old, tail + last, fresh + new
    return renumbered


def _disk_moves(
    spans: Sequence[SpanPages],
    home: Sequence[Sequence[int]],
    tables: Sequence[Sequence[int]],
    page_tokens: int,
) -> DiskMoves:
    read: list[tuple[int, int]] = []
    written: list[tuple[int, int]] = []
    kept: list[tuple[int, int]] = []
    for span, own, table in zip(spans, home, tables):
        pairs = list(zip(own, table))
        full, complete = span.start // page_tokens, span.end // page_tokens
        read += pairs[:full]
        written += pairs[full:complete]
        if span.end % page_tokens:
            assert span.tail is not None
            kept.append((span.tail, table[complete]))
    tails = torch.tensor([s.tail for s in spans if s.start % page_tokens], dtype=torch.long)
    kept_tails, kept_places = torch.tensor(kept, dtype=torch.long).view(-1, 2).T
    return DiskMoves(_runs(read), tails, _runs(written), kept_tails, kept_places, len(read))


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


def _similar_lengths(
    singles: Sequence[tuple[SpanPages, Sequence[int]]], page_tokens: int, gathered_tokens: int
) -> list[list[tuple[SpanPages, Sequence[int]]]]:
    """Batches in which the longest sequence has at most a quarter more pages than the shortest.

    Sequences come in order of length, so the newest one is a batch's longest so far.
    """
    batches: list[list[tuple[SpanPages, Sequence[int]]]] = []
    for single in sorted(singles, key=lambda item: item[0].end):
        pages = len(single[1])
        if batches:
            shortest = len(batches[-1][0][1])
            tokens = pages * page_tokens * (len(batches[-1]) + 1)
        if not batches or pages > max(shortest * 1.25, shortest + 1) or tokens > gathered_tokens:
            batches.append([])
        batches[-1].append(single)
    return batches


def _decode_batch(
    batch: Sequence[tuple[SpanPages, Sequence[int]]], device: torch.device
) -> DecodeBatch:
    longest = max(len(table) for _, table in batch)
    padded = [[*table, *([table[0]] * (longest - len(table)))] for _, table in batch]
    return DecodeBatch(
        rows=torch.tensor([span.row for span, _ in batch], device=device),
        pages=torch.tensor(padded, device=device),
        lengths=torch.tensor([span.end for span, _ in batch], device=device),
    )
