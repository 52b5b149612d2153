"""Facts about pages that move to a tier of sequences that wait, and back."""

from __future__ import annotations

import random

import pytest

from offload.page_table import Page
from offload.pages import PagePools
from offload.tiers import Tier

SIZE = 4


def make_pools(pages: int = 8, swap: int = 4) -> PagePools:
    return PagePools({Tier.DEVICE: pages, Tier.HOST: swap}, SIZE, swap=Tier.HOST)


def next_sweep(pools: PagePools) -> list[tuple[Page, Page]]:
    """Copies of the sweep that begins, after the one before has ended."""
    pools.settle()
    return [(copy.source, copy.target) for copy in pools.take_copies()]


def test_nobody_who_runs_gets_pages_of_the_swap_tier():
    pools = make_pools(pages=2)
    assert (pools.total_free, pools.fits_ever(8), pools.fits_ever(9)) == (2, True, False)
    assert pools.allocate(0, 8)
    assert not pools.allocate(1, 1)


def test_full_pages_move_and_the_last_one_is_free_at_once():
    """Those that move are read until the sweep is over: nobody has them before that."""
    pools = make_pools(pages=3)
    pools.allocate(0, 10)
    before = pools.tables[0].pages
    assert pools.can_swap_out(0)
    pools.swap_out(0, 8)
    assert [page.tier for page in pools.tables[0].pages] == [Tier.HOST, Tier.HOST]
    assert pools.total_free == 1
    assert next_sweep(pools) == [*zip(before[:2], pools.tables[0].pages)]
    assert pools.total_free == 1
    pools.settle()
    assert pools.total_free == 3


def test_pages_come_back_with_room_for_more():
    pools = make_pools(pages=3)
    pools.allocate(0, 8)
    pools.swap_out(0, 8)
    assert not pools.swap_in(0, 9), "they have not even left"
    next_sweep(pools)
    pools.settle()
    pools.allocate(1, 1)
    assert not pools.swap_in(0, 9), "one page is missing"
    assert pools.tables[0].tokens == 8
    assert pools.swap_in(0, 8)
    assert [page.tier for page in pools.tables[0].pages] == [Tier.DEVICE, Tier.DEVICE]
    assert pools.free_pages(Tier.HOST) == 2, "what is copied from there is not free yet"
    next_sweep(pools)
    pools.settle()
    assert pools.free_pages(Tier.HOST) == 4


def test_what_others_have_does_not_move():
    pools = make_pools()
    pools.allocate(0, 8)
    pools.fork(0, 1, 8, 8)
    assert not pools.can_swap_out(0)
    pools.release(1)
    assert pools.can_swap_out(0)


def test_without_room_or_a_tier_nothing_moves():
    pools = make_pools(swap=1)
    pools.allocate(0, 8)
    assert not pools.can_swap_out(0)
    alone = PagePools({Tier.DEVICE: 4}, SIZE)
    alone.allocate(0, 8)
    assert not alone.can_swap_out(0)


class Job:
    """Sequences that begin, end, move away and back, and what every page then holds."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.pools = make_pools(pages=draw.randint(6, 20), swap=draw.randint(2, 12))
        self.content: dict[Page, list[tuple[int, int]]] = {}
        self.stored: dict[int, int] = {}
        self.away: set[int] = set()
        self.begun = self.moved = 0

    def begin(self) -> None:
        self.begun += 1
        if self.pools.allocate(self.begun, 1):
            self.stored[self.begun] = 0

    def end(self, sequence: int) -> None:
        self.pools.release(sequence)
        del self.stored[sequence]
        self.away.discard(sequence)

    def leave(self, sequence: int) -> None:
        full = self.stored[sequence] // SIZE * SIZE
        if full and sequence not in self.away and self.pools.can_swap_out(sequence):
            self.pools.swap_out(sequence, full)
            self.stored[sequence] = full
            self.away.add(sequence)
            self.moved += 1

    def come_back(self, sequence: int) -> None:
        more = self.stored[sequence] + 1
        if sequence in self.away and self.pools.swap_in(sequence, more):
            self.away.remove(sequence)

    def sweep(self) -> None:
        """Copies first; then all sequences that are here store up to three positions more."""
        for source, target in next_sweep(self.pools):
            self.content[target] = list(self.content.get(source, []))
        for sequence in self.stored.keys() - self.away:
            more = self.stored[sequence] + self.draw.randint(0, 3)
            if self.pools.allocate(sequence, more):
                for position in range(self.stored[sequence], more):
                    page = self.pools.tables[sequence].pages[position // SIZE]
                    kept = self.content.get(page, [])[: position % SIZE]
                    self.content[page] = [*kept, (sequence, position)]
                self.stored[sequence] = more

    def check(self) -> None:
        for sequence, count in self.stored.items():
            pages = self.pools.tables[sequence].pages
            found = [each for page in pages for each in self.content.get(page, [])][:count]
            assert found == [(sequence, position) for position in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_keep_what_was_stored(seed):
    """In 5 000 sweeps every position is where its table says, and no page is lost."""
    job = Job(random.Random(seed))
    for _ in range(5000):
        if not job.stored or job.draw.random() < 0.3:
            job.begin()
        if job.stored:
            actions = [job.end, job.leave, job.leave, job.come_back, job.come_back]
            job.draw.choice(actions)(job.draw.choice(list(job.stored)))
        job.sweep()
        job.check()
    assert job.moved > 50
    for sequence in list(job.stored):
        job.end(sequence)
    next_sweep(job.pools)
    job.pools.settle()
    pools = job.pools
    assert all(pools.free_pages(tier) == count for tier, count in pools.capacity.items())
