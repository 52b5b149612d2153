"""KV pages: a pool of page numbers per tier, and the sequences that hold them (no torch)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload.page_choice import choose_tiers
from offload.page_copies import PageCopies
from offload.page_table import Page, PageCopy, PageTable
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence


@dataclass(slots=True)
class PagePools:
    """Free pages per tier and the tables of the sequences that hold the others.

    A page may be in several tables (`fork`); who adds rows to such a page gets a copy first. What
    has to be copied is collected here (`take_copies`), and what a copy reads stays as it is until
    the sweep that makes the copy is over (`settle`).
    """

    capacity: Mapping[Tier, int]
    """Pages per tier; tiers with none may be left out."""
    page_tokens: int
    largest_table: Mapping[Tier, int] = field(default_factory=dict)
    """Most pages of a tier that one sequence, or one micro-batch, may have (staging is finite)."""
    tails: int = 0
    """Sequences that may have pages on DISK: each needs a page in RAM besides."""
    keeps_recent: bool = False
    """Pages are packed when they are full. Every sequence needs a tail for its newest page, and its
    first one, which stays there."""
    swap: Tier | None = None
    """A tier whose pages only sequences that wait have."""
    on_change: Callable[[Tier, int], None] | None = None
    """Called with the tier and the pages taken (positive) or given back (negative)."""
    tables: dict[int, PageTable] = field(default_factory=dict)
    _free: dict[Tier, list[int]] = field(default_factory=dict)
    _free_tails: list[int] = field(default_factory=list)
    _owners: Counter[Page] = field(default_factory=Counter)
    """Tables that a page is in."""
    _copies: PageCopies = field(default_factory=PageCopies)

    def __post_init__(self) -> None:
        # Popped from the end, so low page numbers are used first and reused soonest.
        self._free = {tier: list(range(n))[::-1] for tier, n in self.capacity.items() if n}
        self._free_tails = list(range(self.tails))[::-1]
        assert self.tails or self.swap is Tier.DISK or not self.capacity.get(Tier.DISK)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` positions."""
        return -(-tokens // self.page_tokens)

    def free_pages(self, tier: Tier) -> int:
        """Pages of `tier` that no sequence holds."""
        return len(self._free.get(tier, ()))

    @property
    def total_free(self) -> int:
        """Pages that no sequence holds and every one may have."""
        return sum([len(free) for tier, free in self._free.items() if tier is not self.swap])

    def owners(self, page: Page) -> int:
        """Sequences that `page` belongs to."""
        return self._owners[page]

    def fits_ever(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` positions fits when nothing else runs."""
        tiers = {tier: n for tier, n in self.capacity.items() if tier is not self.swap}
        most = (min(n, self.largest_table.get(tier, n)) for tier, n in tiers.items())
        return self.pages_for(tokens) <= sum(most)

    def allocate(self, sequence: int, tokens: int) -> bool:
        """Give `sequence` pages for `tokens` positions; False, and nothing changes, without room.

        Each page comes from the tier with the largest free share that may hold another one of the
        sequence's, so that tiers fill in step and growing sequences use what is free anywhere. A
        page that the new positions begin in is copied first if others have it, too.
        """
        table = self.tables.get(sequence) or PageTable()
        if tokens <= table.room:
            table.tokens = max(table.tokens, tokens)
            return True
        shared = self._shared_page_to_write(table, tokens)
        count = self.pages_for(tokens) - len(table.pages)
        tiers = self._choose(table, max(0, count) + (shared is not None))
        if tiers is None:
            return False
        pages = self._take(table, tiers)
        if shared is not None:
            self._copy(table, shared, pages.pop(0))
        table.pages += pages
        table.tokens = max(table.tokens, tokens)
        table.room = len(table.pages) * self.page_tokens
        self.tables[sequence] = table
        return True

    def _shared_page_to_write(self, table: PageTable, tokens: int) -> int | None:
        if tokens <= table.tokens or not table.tokens % self.page_tokens:
            return None
        index = table.tokens // self.page_tokens
        return index if self._owners[table.pages[index]] > 1 else None

    def _copy(self, table: PageTable, index: int, target: Page) -> None:
        """Put `target`, with the content of the page at `index`, in its place."""
        source = table.pages[index]
        to_tail = table.tail if target.tier is Tier.DISK else None
        self._copies.add(PageCopy(source, target, to_tail=to_tail))
        table.pages[index] = target
        self._let_go(source)

    def _choose(self, table: PageTable, count: int) -> list[Tier] | None:
        """A tier for each of `count` new pages; None if there are not so many."""
        free = {tier: len(each) for tier, each in self._free.items() if tier is not self.swap}
        if table.tail is None and not self._free_tails:
            if self.keeps_recent:
                return None
            free.pop(Tier.DISK, None)
        return choose_tiers(table.pages, count, free, self.capacity, self.largest_table)

    def _take(self, table: PageTable, tiers: Sequence[Tier]) -> list[Page]:
        if (self.keeps_recent or Tier.DISK in tiers) and table.tail is None:
            table.tail = self._free_tails.pop()
        # Last in, first out: a sequence gets pages that lie next to each other, as they were taken.
        pages = [Page(tier, self._free[tier].pop()) for tier in tiers]
        for page in pages:
            self._owners[page] = 1
        self._report(tiers, 1)
        return pages

    def fork(self, parent: int, child: int, tokens: int, computed: int) -> int:
        """Let the new sequence `child` begin with the first `tokens` of `computed` positions.

        They share pages; a last page that is not full is copied by whoever adds rows to it first.
        Of pages that are at their owner's tail the child has copies from the start. Returns how
        many positions the child has: none, and nothing changes, if there is no room for that, and
        only those in full pages if the last one was packed, and its values are not known exactly.
        """
        origin = self.tables[parent]
        assert child not in self.tables
        assert tokens <= computed <= origin.tokens
        full = tokens // self.page_tokens
        stored = computed >= (full + 1) * self.page_tokens
        if self.keeps_recent and stored and full:
            tokens = full * self.page_tokens
        table = PageTable(origin.pages[: self.pages_for(tokens)], tokens=tokens)
        own = self._at_tails(table, full)
        staying = [page for index, page in enumerate(table.pages) if index not in own]
        if (tiers := self._choose(PageTable(staying), len(own))) is None:
            return 0
        self._owners.update(staying)
        for index, page in zip(own, self._take(table, tiers)):
            in_file = stored and not self.keeps_recent
            from_tail = None if in_file else origin.tail
            to_tail = table.tail if self.keeps_recent or page.tier is Tier.DISK else None
            copy = PageCopy(table.pages[index], page, from_tail, to_tail, first=index == 0)
            self._copies.add(copy)
            table.pages[index] = page
        self.tables[child] = table
        origin.room = 0  # its last page may be the child's, too
        return tokens

    def _at_tails(self, table: PageTable, full: int) -> list[int]:
        """Which pages of a child are at its parent's tail; so many are `full`."""
        partial = [full] if len(table.pages) > full else []
        if self.keeps_recent:
            return sorted({0, *partial})
        return [index for index in partial if table.pages[index].tier is Tier.DISK]

    def move(self, wanted: Mapping[Page, Tier]) -> list[Page]:
        """Move full pages to another tier, for all sequences that have them; those that did.

        Nothing is done to pages that are not full, that a copy is about to read or fill, or for
        which the tier has no room.
        """
        if not wanted:
            return []
        moved: dict[Page, Page] = {}
        held = {number: Counter(p.tier for p in t.pages) for number, t in self.tables.items()}
        homes = self._full_pages(wanted.keys() - self._copies.pages)
        for page, tier in wanted.items():
            sequences = homes.get(page, [])
            if not sequences or tier is page.tier or not self._free.get(tier):
                continue
            most = self.largest_table.get(tier, self.capacity[tier])
            if any(held[sequence][tier] >= most for sequence in sequences):
                continue
            for sequence in sequences:
                held[sequence][tier] += 1
            moved[page] = self._relocate(page, tier)
        for table in self.tables.values() if moved else ():
            table.pages = [moved.get(page, page) for page in table.pages]
        return list(moved)

    def _relocate(self, page: Page, tier: Tier) -> Page:
        """Another place for the content of `page`."""
        new = Page(tier, self._free[tier].pop())
        self._owners[new] = self._owners.pop(page)
        self._copies.add(PageCopy(page, new))
        self._copies.keep(page)
        self._report([tier], 1)
        return new

    def can_swap_out(self, sequence: int) -> bool:
        """Whether the swap tier has room for the full pages of `sequence`, and they are its own."""
        table, busy = self.tables[sequence], self._copies.pages
        full = table.pages[: table.tokens // self.page_tokens]
        room = self.swap is not None and 0 < len(full) <= self.free_pages(self.swap)
        return room and not any(self._owners[page] > 1 or page in busy for page in full)

    def swap_out(self, sequence: int, tokens: int) -> None:
        """Move the pages of the first `tokens` positions, which fill them, to the swap tier.

        The others are given back at once, those that move when the next sweep is over.
        """
        table, count = self.tables[sequence], tokens // self.page_tokens
        assert self.swap is not None
        assert tokens == count * self.page_tokens <= table.tokens
        kept = table.pages[:count]
        for page in reversed(table.pages[count:]):
            self._let_go(page)
        table.pages = [self._relocate(page, self.swap) for page in kept]
        table.tokens, table.room = tokens, 0

    def swap_in(self, sequence: int, tokens: int) -> bool:
        """Bring what `swap_out` moved back, with pages for `tokens` positions in all.

        False, and nothing changes, without room, or if it has not been moved yet.
        """
        table = self.tables[sequence]
        tiers = self._choose(table, self.pages_for(tokens))
        if tiers is None or not self._copies.pages.isdisjoint(table.pages):
            return False
        table.pages = [self._relocate(page, tier) for page, tier in zip(table.pages, tiers)]
        return self.allocate(sequence, tokens)

    def movable(self, pages: Sequence[Page], tokens: int) -> Sequence[Page]:
        """Of a sequence's, those that are full and read where they are."""
        return pages[int(self.keeps_recent) : tokens // self.page_tokens]

    def _full_pages(self, pages: Collection[Page]) -> dict[Page, list[int]]:
        """The sequences that have each of `pages`, if it is full."""
        found: dict[Page, list[int]] = {}
        for sequence, table in self.tables.items():
            for page in self.movable(table.pages, table.tokens):
                if page in pages:
                    found.setdefault(page, []).append(sequence)
        return {page: those for page, those in found.items() if len(those) == self._owners[page]}

    def release(self, sequence: int) -> None:
        """Give back all pages of `sequence` that no other one has."""
        table = self.tables.pop(sequence)
        for page in reversed(table.pages):
            self._let_go(page)
        if table.tail is not None and self._copies.let_go_of_tail(table.tail):
            self._free_tails.append(table.tail)

    def _let_go(self, page: Page) -> None:
        """One table less has `page`."""
        self._owners[page] -= 1
        if self._owners[page]:
            return
        del self._owners[page]
        if self._copies.let_go(page):
            self._give_back([page])

    def _give_back(self, pages: Sequence[Page]) -> None:
        for page in pages:
            self._free[page.tier].append(page.number)
        self._report([page.tier for page in pages], -1)

    def pages_to_erase(self, sequence: int) -> dict[Tier, list[int]]:
        """Numbers of pages with what `sequence` alone has stored, the places of moved ones too."""
        found: dict[Tier, list[int]] = {}
        own = [page for page in self.tables[sequence].pages if self._owners[page] == 1]
        for page in (*own, *self._copies.being_read):
            found.setdefault(page.tier, []).append(page.number)
        return found

    def take_copies(self) -> list[PageCopy]:
        """What has to be copied in this sweep, before anything else reads or writes these pages."""
        return self._copies.take()

    def settle(self) -> None:
        """The sweep whose copies were taken is over: what they read may be used again."""
        pages, tails = self._copies.settle()
        self._give_back(pages)
        self._free_tails += tails

    def _report(self, tiers: Sequence[Tier], sign: int) -> None:
        if self.on_change:
            for tier, pages in Counter(tiers).items():
                self.on_change(tier, sign * pages)
