"""KV pages: a pool of page numbers per tier, and the page table of every sequence (no torch).

A page holds the keys and values of `page_tokens` consecutive positions of one layer. A sequence's
table is valid in every layer: page 7 of layer 0 and page 7 of layer 31 are of the same positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload.tiers import DISK_BLOCK, Tier, padded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(slots=True)
class PageTable:
    """The pages of one sequence, all on one tier."""

    tier: Tier
    pages: list[int]
    tail: int | None = None
    """On DISK, which takes whole pages: the place in RAM of the page that is not full yet."""


@dataclass(slots=True)
class PagePools:
    """Free pages per tier and the tables of the sequences that hold the others."""

    capacity: Mapping[Tier, int]
    """Pages per tier; tiers with none may be left out."""
    page_tokens: int
    largest_table: Mapping[Tier, int] = field(default_factory=dict)
    """Most pages of a tier that one sequence, or one micro-batch, may have (staging is finite)."""
    tails: int = 0
    """Sequences that may have pages on DISK: each needs a page in RAM besides."""
    on_change: Callable[[Tier, int], None] | None = None
    """Called with the tier and the pages taken (positive) or given back (negative)."""
    tables: dict[int, PageTable] = field(default_factory=dict)
    _free: dict[Tier, list[int]] = field(default_factory=dict)
    _free_tails: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Popped from the end, so low page numbers are used first and reused soonest.
        self._free = {tier: list(range(n))[::-1] for tier, n in self.capacity.items() if n}
        self._free_tails = list(range(self.tails))[::-1]
        assert self.tails or not self.capacity.get(Tier.DISK), "pages on DISK need tails"

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` positions."""
        return -(-tokens // self.page_tokens)

    def free_pages(self, tier: Tier) -> int:
        """Pages of `tier` that no sequence holds."""
        return len(self._free.get(tier, ()))

    def fits_ever(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` positions fits when nothing else runs."""
        needed = self.pages_for(tokens)
        return any(
            needed <= min(count, self.largest_table.get(tier, count))
            for tier, count in self.capacity.items()
        )

    def allocate(self, sequence: int, tokens: int) -> bool:
        """Reserve pages for `tokens` positions of `sequence`; False if no tier has them now.

        Among the tiers with room, the one with the largest free share is taken, which keeps the
        pages in use split like the capacities.
        """
        needed = self.pages_for(tokens)
        room = [
            tier
            for tier, free in self._free.items()
            if needed <= min(len(free), self.largest_table.get(tier, needed))
            and (tier is not Tier.DISK or self._free_tails)
        ]
        if not room:
            return False
        tier = max(room, key=lambda t: len(self._free[t]) / self.capacity[t])
        free = self._free[tier]
        # Last in, first out: a sequence gets pages that lie next to each other, as they were taken.
        table = PageTable(tier, [free.pop() for _ in range(needed)])
        if tier is Tier.DISK:
            table.tail = self._free_tails.pop()
        self.tables[sequence] = table
        if self.on_change:
            self.on_change(tier, needed)
        return True

    def release(self, sequence: int) -> None:
        """Give back all pages of `sequence`."""
        table = self.tables.pop(sequence)
        self._free[table.tier].extend(reversed(table.pages))
        if table.tail is not None:
            self._free_tails.append(table.tail)
        if self.on_change:
            self.on_change(table.tier, -len(table.pages))


def kv_file_layout(page_bytes: Sequence[int], pages: int) -> tuple[list[int], int]:
    """Where each layer's pages start in the file, in bytes, and the size of the file."""
    starts, end = [], 0
    for size in page_bytes:
        starts.append(end)
        end += padded(pages * size, DISK_BLOCK)
    return starts, end
