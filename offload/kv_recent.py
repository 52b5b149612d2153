"""The first and the newest page of every sequence as they were computed, beside packed ones.

With pages in groups of few bits only whole pages are stored, on any tier. A sequence's last page,
while it fills, is in a pool of its own on the device, and so is its first one for good: many heads
attend to a sequence's first tokens from everywhere (attention sinks, arXiv 2309.17453), so that
errors there do not average out (KVQuant, arXiv 2401.18079, section 3.6). They are at two places of
the pool, which belong to the sequence's *tail*.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from compression.expansion import quantize_unchecked
from compression.rotation import rotated
from offload.kv_layout import KVGroup, build_group
from offload.kv_moves import SpanPages
from offload.paged_kv import KVFormat, PagedKV, TokenSlots
from offload.tiers import PACKED_PAGES, Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from offload.kv_memory import KVMemory
    from offload.page_table import Page

    _Rows: TypeAlias = tuple[torch.Tensor, torch.Tensor]
    """New keys [rows, kv_heads, key_dim] and values of a micro-batch."""


@dataclass(frozen=True, slots=True)
class FullPages:
    """Some pages of one tier that a micro-batch fills. They are packed together."""

    tier: Tier
    numbers: torch.Tensor
    """[n] of the pages at home; on the device if that is their tier."""
    places: torch.Tensor | None
    """[n] where they are in the pool of newest pages, …"""
    rows: torch.Tensor | None
    """… or [n * page_tokens] the micro-batch's rows that they consist of."""
    tails: torch.Tensor
    """[n] of their sequences."""


@dataclass(frozen=True, slots=True)
class RecentRows:
    """What a micro-batch does with the newest pages of its sequences."""

    group: KVGroup
    """Rows in the page that a sequence's first row is in, and who attends to it."""
    full: list[FullPages]
    late: torch.Tensor
    """[n] rows of a later page that is not full, which takes the place of one that is …"""
    slots: TokenSlots
    """… here, once attention has read that."""
    begun: torch.Tensor
    """Tails of sequences whose first page is full after this sweep."""
    tails: torch.Tensor
    """Of every row."""

    @property
    def keeps_rows(self) -> bool:
        """New keys and values are needed after attention, too."""
        return len(self.late) > 0 or any(pages.rows is not None for pages in self.full)


def recent_rows(
    spans: Sequence[SpanPages],
    tables: Sequence[Sequence[Page]],
    page_tokens: int,
    device: torch.device,
) -> RecentRows:
    """Of the spans of a micro-batch, with the page tables of their sequences.

    `spans` are those of `recent_span`. Rows that are in several pages are a chunk however few they
    are: attention finds no more than the first of these pages in its pool.
    """
    here = [
        replace(span, crosses=(span.end - 1) // page_tokens > span.start // page_tokens)
        for span in spans
    ]
    group = build_group(here, page_tokens, device, Tier.DEVICE, staged=False)
    late = [each for span in here for each in _late(span, page_tokens)]
    rows, places, offsets = torch.tensor(late, dtype=torch.long).view(-1, 3).T.to(device)
    full = list(_full_pages(here, tables, page_tokens, device))
    begun = [span.tail for span in here if span.start < page_tokens <= span.end]
    tails = [span.tail for span in here for _ in range(span.count)]
    known = torch.tensor([*begun, *tails], dtype=torch.long).to(device)
    slots = TokenSlots(places, offsets)
    return RecentRows(group, full, rows, slots, *known.split([len(begun), len(tails)]))


def recent_span(row: int, start: int, end: int, page_tokens: int, tail: int) -> SpanPages:
    """Rows of one sequence, and the two pages of its tail; one, if its first page is the newest."""
    places, index = _places(tail), start // page_tokens
    pages, indices = (places, [0, index]) if index else (places[:1], [0])
    return SpanPages(row, start, end, pages, indices, tail=tail)


def _places(tail: int) -> list[int]:
    """Of a sequence's first page, and of its newest one."""
    return [2 * tail, 2 * tail + 1]


def _late(span: SpanPages, page_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Row, place and offset of the rows in a later page than the first row's that is not full."""
    assert span.tail is not None
    first = span.end // page_tokens * page_tokens
    for position in range(first, span.end) if first > span.start else ():
        yield span.row + position - span.start, _places(span.tail)[1], position - first


def _full_pages(
    spans: Sequence[SpanPages],
    tables: Sequence[Sequence[Page]],
    page_tokens: int,
    device: torch.device,
) -> Iterator[FullPages]:
    found: dict[tuple[Tier, bool], list[tuple[int, int, int]]] = defaultdict(list)
    for span, table in zip(spans, tables):
        assert span.tail is not None
        begun = span.start // page_tokens
        for index in range(max(1, begun), span.end // page_tokens):
            page, row = table[index], span.row + index * page_tokens - span.start
            from_tail = index == begun
            source = _places(span.tail)[1] if from_tail else row
            found[page.tier, from_tail].append((page.number, source, span.tail))
    slots = torch.arange(page_tokens)
    for (tier, from_tail), pages in found.items():
        for start in range(0, len(pages), PACKED_PAGES):
            numbers, sources, tails = torch.tensor(pages[start : start + PACKED_PAGES]).T
            numbers = numbers.to(device) if tier is Tier.DEVICE else numbers.contiguous()
            if from_tail:
                where = sources.to(device), None
            else:
                where = None, (sources.unsqueeze(1) + slots).view(-1).to(device)
            yield FullPages(tier, numbers, *where, tails.to(device))


class RecentPages:
    """Two pages for each sequence and layer, and a mean key and value."""

    def __init__(self, memory: KVMemory, sequences: int, *, centred: bool) -> None:
        """Of at most so many sequences; `memory` also says how full pages are stored.

        Unless keys are `centred`, only values are.
        """
        assert memory.format.groups is not None
        self._centred = centred
        self._memory = memory
        self._groups = memory.format.groups
        plain = KVFormat(memory.format.dtype)
        self.pools = memory.pools(Tier.DEVICE, 2 * sequences, "first and newest KV pages", plain)
        self.centres = memory.pools(Tier.DEVICE, sequences, "mean keys and values", plain, 1)
        """As pages of one token: see `_note_centres`."""
        self._rows: dict[tuple[int, int], _Rows] = {}
        """By layer and micro-batch, until they are packed."""

    def keep(self, layer: int, number: int, recent: RecentRows, rows: _Rows) -> None:
        """New keys and values of a micro-batch, which `pack` may need."""
        if recent.keeps_rows:
            self._rows[layer, number] = rows

    def pack(
        self, layer: int, number: int, recent: RecentRows
    ) -> Iterator[tuple[FullPages, torch.Tensor]]:
        """Once attention is over: all pages that are full now, as they are stored, [n, bytes]."""
        rows = self._rows.pop((layer, number), None)
        self._note_centres(layer, recent)
        for pages in recent.full:
            yield pages, self._packed(layer, pages, rows)
        if len(recent.late):
            assert rows is not None
            pool = self.pools[layer]
            pool.store(recent.slots, pool.pack(*(side[recent.late] for side in rows)))

    def _packed(self, layer: int, pages: FullPages, rows: _Rows | None) -> torch.Tensor:
        pool, count, tokens = self.pools[layer], len(pages.numbers), self._memory.page_tokens
        data = pool.raw.new_empty(count * pool.raw.shape[1])
        full = PagedKV.of(data, self._memory.shapes[layer], tokens)
        if pages.places is not None:
            torch.index_select(pool.raw, 0, pages.places, out=full.raw)
        else:
            assert rows is not None
            assert pages.rows is not None
            at = torch.arange(len(pages.rows), device=data.device)
            slots = TokenSlots(at // tokens, at % tokens)
            full.store(slots, full.pack(*(side[pages.rows] for side in rows)))
        centres = self.centres[layer]
        sides = (full.keys, centres.keys), (full.values, centres.values)
        return torch.cat([self._quantized(*each, pages.tails) for each in sides], dim=1)

    def _quantized(
        self, side: torch.Tensor, centres: torch.Tensor, tails: torch.Tensor
    ) -> torch.Tensor:
        """Keys or values [n, kv_heads, tokens, dim] of pages: [n, bytes]."""
        moved = side.float() - centres[tails].float()
        turned = rotated(moved.flatten(0, 2), torch.float32)
        return quantize_unchecked(turned, self._groups).view(len(side), -1)

    def _note_centres(self, layer: int, recent: RecentRows) -> None:
        """Of sequences whose first page is full now: the mean of its keys, and of its values.

        Without the first token's, which are unlike any others (arXiv 2309.17453). Taken from what
        is packed, it leaves less to be rounded; `flexrun.attention.centres` puts it back.
        """
        if not len(recent.begun):
            return
        pool, centres = self.pools[layer], self.centres[layer]
        skipped = min(1, self._memory.page_tokens - 1)
        sides = [(pool.values, centres.values)]
        sides += [(pool.keys, centres.keys)] if self._centred else []
        for side, into in sides:
            first = side[2 * recent.begun][:, :, skipped:]
            into[recent.begun] = first.float().mean(2, keepdim=True).to(into.dtype)

    def centres_of(self, layer: int, recent: RecentRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every row of a micro-batch: [rows, kv_heads, key_dim], and of values."""
        centres = self.centres[layer]
        return centres.keys[recent.tails].squeeze(2), centres.values[recent.tails].squeeze(2)

    def copy_centre(self, layer: int, source: int, target: int) -> None:
        """A sequence begins like another one, with a copy of its first page."""
        raw = self.centres[layer].raw
        raw[target] = raw[source]

    def page(self, layer: int, tail: int, *, first: bool) -> torch.Tensor:
        """The first or the newest page of a sequence: uint8."""
        return self.pools[layer].raw[_places(tail)[0 if first else 1]].view(torch.uint8)

    def erase(self, tail: int) -> None:
        """Let nobody read the values of a sequence's pages, which may be no numbers."""
        for pool, centres in zip(self.pools, self.centres):
            pool.raw[_places(tail)] = 0
            centres.raw[tail] = 0

    def close(self) -> None:
        """Let go of all memory."""
        self.pools.clear()
        self.centres.clear()
        self._rows.clear()
