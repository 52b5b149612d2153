"""KV pages: a pool of page numbers per tier, and the page table of every sequence (no torch).

A page holds the keys and values of `page_tokens` consecutive positions of one layer. A sequence's
table is valid in every layer: page 7 of layer 0 and page 7 of layer 31 are of the same positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(slots=True)
class PageTable:
    """The pages of one sequence, all on one tier."""

    tier: Tier
    pages: list[int]


@dataclass(slots=True)
class PagePools:
    """Free pages per tier and the tables of the sequences that hold the others."""

    capacity: Mapping[Tier, int]
    """Pages per tier; tiers with none may be left out."""
    page_tokens: int
    largest_table: Mapping[Tier, int] = field(default_factory=dict)
    """Most pages of a tier that one sequence, or one micro-batch, may have (staging is finite)."""
    on_change: Callable[[Tier, int], None] | None = None
    """Called with the tier and the pages taken (positive) or given back (negative)."""
    tables: dict[int, PageTable] = field(default_factory=dict)
    _free: dict[Tier, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Popped from the end, so low page numbers are used first and reused soonest.
        self._free = {tier: list(range(n))[::-1] for tier, n in self.capacity.items() if n}

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
        ]
        if not room:
            return False
        tier = max(room, key=lambda t: len(self._free[t]) / self.capacity[t])
        free = self._free[tier]
        self.tables[sequence] = PageTable(tier, [free.pop() for _ in range(needed)])
        if self.on_change:
            self.on_change(tier, needed)
        return True

    def release(self, sequence: int) -> None:
        """Give back all pages of `sequence`."""
        table = self.tables.pop(sequence)
        self._free[table.tier].extend(reversed(table.pages))
        if self.on_change:
            self.on_change(table.tier, -len(table.pages))
