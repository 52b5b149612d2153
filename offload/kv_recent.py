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
from typing import TYPE_CHECKING

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
    rows, tails, offsets = torch.tensor(late, dtype=torch.long).view(-1, 3).T.to(device)
    full = list(_full_pages(here, tables, page_tokens, device))
    return RecentRows(group, full, rows, TokenSlots(tails, offsets))


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
    from_tails: dict[Tier, list[tuple[int, int]]] = defaultdict(list)
    from_rows: dict[Tier, list[tuple[int, int]]] = defaultdict(list)
    for span, table in zip(spans, tables):
        begun = span.start // page_tokens
        for index in range(max(1, begun), span.end // page_tokens):
            page, row = table[index], span.row + index * page_tokens - span.start
            if index == begun:
                from_tails[page.tier].append((page.number, span.pages[1]))
            else:
                from_rows[page.tier].append((page.number, row))
    slots = torch.arange(page_tokens)
    for found, by_row in ((from_tails, False), (from_rows, True)):
        for tier, pairs in found.items():
            for start in range(0, len(pairs), PACKED_PAGES):
                some = torch.tensor(pairs[start : start + PACKED_PAGES])
                numbers = some[:, 0].to(device) if tier is Tier.DEVICE else some[:, 0].contiguous()
                if by_row:
                    rows = (some[:, 1:] + slots).view(-1).to(device)
                    yield FullPages(tier, numbers, None, rows)
                else:
                    yield FullPages(tier, numbers, some[:, 1].to(device), None)


class RecentPages:
    """Two pages for each sequence and layer."""

    def __init__(self, memory: KVMemory, sequences: int) -> None:
        """Of at most so many sequences; `memory` also says how full pages are stored."""
        assert memory.format.groups is not None
        self._memory = memory
        self._groups = memory.format.groups
        plain = KVFormat(memory.format.dtype)
        self.pools = memory.pools(Tier.DEVICE, 2 * sequences, "first and newest KV pages", plain)

    def packed(
        self, layer: int, pages: FullPages, rows: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """`pages` as they are stored: uint8 [n, bytes of a page].

        `rows`: new keys [rows, kv_heads, key_dim] and values of the micro-batch.
        """
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
        if full.table is not None:
            return self._quantized(full.table, count)
        sides = full.keys, full.values
        return torch.cat([self._quantized(side.flatten(0, 2), count) for side in sides], dim=1)

    def _quantized(self, values: torch.Tensor, pages: int) -> torch.Tensor:
        """Rows [n, dim] of so many pages: [pages, bytes]."""
        turned = rotated(values, torch.float32)
        return quantize_unchecked(turned, self._groups).view(pages, -1)

    def store_late(
        self, layer: int, recent: RecentRows, rows: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        """Put what a micro-batch begins another page with into the place of a packed one."""
        if len(recent.late):
            assert rows is not None
            pool = self.pools[layer]
            pool.store(recent.slots, pool.pack(*(side[recent.late] for side in rows)))

    def page(self, layer: int, tail: int, *, first: bool) -> torch.Tensor:
        """The first or the newest page of a sequence: uint8."""
        return self.pools[layer].raw[_places(tail)[0 if first else 1]].view(torch.uint8)

    def erase(self, tail: int) -> None:
        """Let nobody read the values of a sequence's pages, which may be no numbers."""
        for pool in self.pools:
            pool.raw[_places(tail)] = 0

    def close(self) -> None:
        """Let go of all memory."""
        self.pools.clear()
