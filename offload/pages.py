"""KV pages: a pool of page numbers per tier, and the page table of every sequence (no torch).

A page holds the keys and values of `page_tokens` consecutive positions of one layer. A sequence's
table is valid in every layer: page 7 of layer 0 and page 7 of layer 31 are of the same positions.
The pages of one sequence may lie on all tiers at once (vLLM's block tables, one pool per tier).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from offload.tiers import DISK_BLOCK, Tier, padded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Page(NamedTuple):
    """Where a page lies."""

    tier: Tier
    number: int


@dataclass(slots=True)
class PageTable:
    """The pages of one sequence."""

    pages: list[Page] = field(default_factory=list)
    tail: int | None = None
    """With pages on DISK, which takes whole ones: the place in RAM of a page that is not full."""

    def by_tier(self, count: int) -> dict[Tier, tuple[list[int], list[int]]]:
        """Numbers and places of the first `count` pages, for every tier that some are on.

        The tiers come in one order, whatever the table.
        """
        found: dict[Tier, tuple[list[int], list[int]]] = {tier: ([], []) for tier in Tier}
        for index, page in enumerate(self.pages[:count]):
            numbers, places = found[page.tier]
            numbers.append(page.number)
            places.append(index)
        return {tier: lists for tier, lists in found.items() if lists[0]}


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

    @property
    def total_free(self) -> int:
        """Pages that no sequence holds."""
        return sum(map(len, self._free.values()))

    def fits_ever(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` positions fits when nothing else runs."""
        most = (min(n, self.largest_table.get(tier, n)) for tier, n in self.capacity.items())
        return self.pages_for(tokens) <= sum(most)

    def allocate(self, sequence: int, tokens: int) -> bool:
        """Give `sequence` pages for `tokens` positions; False, and nothing changes, without room.

        Each page comes from the tier with the largest free share that may hold another one of the
        sequence's, so that tiers fill in step and growing sequences use what is free anywhere.
        """
        table = self.tables.get(sequence) or PageTable()
        tiers = self._choose(table, self.pages_for(tokens) - len(table.pages))
        if tiers is None:
            return False
        if Tier.DISK in tiers and table.tail is None:
            table.tail = self._free_tails.pop()
        # Last in, first out: a sequence gets pages that lie next to each other, as they were taken.
        table.pages += [Page(tier, self._free[tier].pop()) for tier in tiers]
        self.tables[sequence] = table
        self._report(tiers, 1)
        return True

    def _choose(self, table: PageTable, count: int) -> list[Tier] | None:
        """A tier for each of `count` new pages; None if there are not so many."""
        free = {tier: len(numbers) for tier, numbers in self._free.items()}
        held = Counter(page.tier for page in table.pages) if count > 0 else Counter()
        if table.tail is None and not self._free_tails:
            free.pop(Tier.DISK, None)
        chosen = []
        for _ in range(count):
            room = [
                tier
                for tier, pages in free.items()
                if pages and held[tier] < self.largest_table.get(tier, self.capacity[tier])
            ]
            if not room:
                return None
            tier = max(room, key=lambda t: free[t] / self.capacity[t])
            free[tier] -= 1
            held[tier] += 1
            chosen.append(tier)
        return chosen

    def release(self, sequence: int) -> None:
        """Give back all pages of `sequence`."""
        table = self.tables.pop(sequence)
        for page in reversed(table.pages):
            self._free[page.tier].append(page.number)
        if table.tail is not None:
            self._free_tails.append(table.tail)
        self._report([page.tier for page in table.pages], -1)

    def _report(self, tiers: Sequence[Tier], sign: int) -> None:
        if self.on_change:
            for tier, pages in Counter(tiers).items():
                self.on_change(tier, sign * pages)


def kv_file_layout(page_bytes: Sequence[int], pages: int) -> tuple[list[int], int]:
    """Where each layer's pages start in the file, in bytes, and the size of the file."""
    starts, end = [], 0
    for size in page_bytes:
        starts.append(end)
        end += padded(pages * size, DISK_BLOCK)
    return starts, end
