"""Pages that several sequences share, are copied before they differ, and move between tiers."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from offload.page_table import Page, PageCopy
from offload.pages import PagePools
from offload.tiers import Tier


def make_pools(**capacity: int) -> PagePools:
    tiers = {Tier(name): pages for name, pages in capacity.items()}
    return PagePools(tiers, 4, tails=6 if "disk" in capacity else 0)


def test_a_fork_takes_no_pages():
    """The child's table begins with the parent's pages, which are free when both are gone."""
    pools = make_pools(device=8)
    assert pools.allocate(0, 13)
    assert pools.fork(0, 1, 10, 10)
    assert pools.tables[1].pages == pools.tables[0].pages[:3]
    assert [pools.owners(page) for page in pools.tables[0].pages] == [2, 2, 2, 1]
    assert pools.total_free == 4
    pools.release(0)
    assert pools.total_free == 5
    pools.release(1)
    assert pools.total_free == 8
    assert pools.take_copies() == []


def test_whoever_writes_first_gets_a_copy():
    """Of the page that is not full, and nobody else of the same page after that."""
    pools = make_pools(device=8)
    assert pools.allocate(0, 10)
    assert pools.fork(0, 1, 10, 10)
    before = list(pools.tables[1].pages)
    assert pools.allocate(1, 11)
    after = pools.tables[1].pages
    assert after[:2] == before[:2]
    assert pools.take_copies() == [PageCopy(before[2], after[2])]
    assert pools.allocate(0, 11)
    assert pools.take_copies() == []
    assert pools.tables[0].pages == before


def test_full_pages_stay_shared():
    pools = make_pools(device=8)
    assert pools.allocate(0, 8)
    assert pools.fork(0, 1, 8, 8)
    assert pools.allocate(1, 12)
    assert pools.take_copies() == []
    assert pools.tables[1].pages[:2] == pools.tables[0].pages


def test_a_copy_needs_room():
    """Without a page for it nothing changes; the parent may then still write in place."""
    pools = make_pools(device=3)
    assert pools.allocate(0, 10)
    assert pools.fork(0, 1, 10, 10)
    before = list(pools.tables[1].pages)
    assert not pools.allocate(1, 11)
    assert pools.tables[1].pages == before
    pools.release(0)
    assert pools.allocate(1, 11)
    assert pools.tables[1].pages == before
    assert pools.take_copies() == []


def test_what_a_copy_reads_is_not_used_before_the_sweep_is_over():
    pools = make_pools(device=4)
    assert pools.allocate(0, 10)
    assert pools.fork(0, 1, 10, 10)
    assert pools.allocate(1, 11)
    source = pools.tables[0].pages[2]
    pools.release(0)
    assert (pools.free_pages(Tier.DEVICE), pools.owners(source)) == (0, 0)
    assert not pools.allocate(2, 1)
    assert len(pools.take_copies()) == 1
    assert not pools.allocate(2, 1)
    pools.settle()
    assert pools.allocate(2, 1)
    assert pools.tables[2].pages == [source]


def test_no_copy_into_a_page_that_was_given_back():
    pools = make_pools(device=5)
    assert pools.allocate(0, 10)
    assert pools.fork(0, 1, 10, 10)
    assert pools.allocate(1, 11)
    pools.release(1)
    assert pools.take_copies() == []


def test_the_copy_of_a_copy_reads_the_original():
    """What is copied twice before a sweep is not there the first time."""
    pools = make_pools(device=9)
    assert pools.allocate(0, 10)
    for child in (1, 2):
        assert pools.fork(child - 1, child, 10, 10)
        assert pools.allocate(child, 11 if child == 2 else 10)
    original = pools.tables[0].pages[2]
    assert pools.allocate(1, 11)
    assert pools.fork(1, 3, 10, 10)
    assert pools.allocate(3, 11)
    assert {copy.source for copy in pools.take_copies()} == {original}


def test_pages_on_disk_move_up_for_all_that_have_them():
    pools = make_pools(device=0, disk=8)
    assert pools.allocate(0, 10)
    assert pools.fork(0, 1, 8, 8)
    pools.capacity[Tier.DEVICE] = 5  # type: ignore[index]
    pools._free[Tier.DEVICE] = list(range(5))
    pages = list(pools.tables[0].pages)
    assert pools.move(dict.fromkeys(pages, Tier.DEVICE)) == pages[:2], "the last one is not full"
    assert pools.tables[1].pages == pools.tables[0].pages[:2]
    assert {page.tier for page in pools.tables[1].pages} == {Tier.DEVICE}
    assert [copy.source for copy in pools.take_copies()] == pages[:2]
    assert pools.free_pages(Tier.DISK) == 5
    pools.settle()
    assert pools.free_pages(Tier.DISK) == 7


class Model:
    """What pages hold, and what every sequence should read."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        draw = self.draw
        capacity = {Tier.DEVICE: draw.randint(0, 25), Tier.HOST: draw.randint(1, 25)}
        tails = draw.choice([0, 2, 5])
        if tails:
            capacity[Tier.DISK] = draw.randint(1, 25)
        limits = {Tier.HOST: draw.randint(2, 10)} if draw.random() < 0.5 else {}
        self.used: Counter[Tier] = Counter()
        self.pools = PagePools(capacity, draw.randint(1, 5), limits, tails)
        self.pools.on_change = lambda tier, pages: self.used.update({tier: pages})
        self.stored: dict[Page, list[Any]] = {}
        self.tails: dict[int, list[Any]] = {}
        self.expected: dict[int, list[int]] = {}
        self.taken: set[Page] = set()
        """Read by copies of the sweep that runs."""

    def grow(self, sequence: int) -> None:
        tokens = len(self.expected.get(sequence, [])) + self.draw.randint(1, 9)
        before = {n: list(table.pages) for n, table in self.pools.tables.items()}
        if not self.pools.allocate(sequence, tokens):
            assert {n: table.pages for n, table in self.pools.tables.items()} == before
            return
        values = self.expected.setdefault(sequence, [])
        values += [self.draw.getrandbits(60) for _ in range(tokens - len(values))]

    def fork(self, parent: int, child: int) -> None:
        values = self.expected[parent]
        tokens = self.draw.randint(1, len(values))
        if self.pools.fork(parent, child, tokens, len(values)):
            self.expected[child] = values[:tokens]

    def release(self, sequence: int) -> None:
        self.pools.release(sequence)
        del self.expected[sequence]

    def move(self) -> None:
        pages = [page for table in self.pools.tables.values() for page in table.pages]
        if pages:
            chosen = self.draw.sample(pages, min(len(pages), 3))
            self.pools.move({page: self.draw.choice(list(Tier)) for page in chosen})

    def sweep(self, computed: dict[int, int]) -> None:
        """Copy, then write all new rows, then check what every sequence reads."""
        pools, size = self.pools, self.pools.page_tokens
        for copy in pools.take_copies():
            held = self.tails[copy.from_tail] if copy.from_tail is not None else None
            content = list(self.stored[copy.source] if held is None else held)
            if copy.to_tail is not None:
                self.tails[copy.to_tail] = content
            else:
                self.stored[copy.target] = content
        for sequence, table in pools.tables.items():
            values = self.expected[sequence]
            for position in range(computed.get(sequence, 0), len(values)):
                index, slot = divmod(position, size)
                page = table.pages[index]
                assert pools.owners(page) == 1, "others have the page that is written"
                disk = page.tier is Tier.DISK
                home = self.tails if disk else self.stored
                key: Any = table.tail if disk else page
                if slot == 0:
                    home[key] = [None] * size
                home[key][slot] = values[position]
                if disk and slot == size - 1:
                    self.stored[page] = list(self.tails[key])
            computed[sequence] = len(values)
        for sequence, table in pools.tables.items():
            assert self.read(table) == self.expected[sequence]

    def read(self, table: Any) -> list[Any]:
        size, values = self.pools.page_tokens, []
        for index, page in enumerate(table.pages[: -(-table.tokens // size)]):
            partial = (index + 1) * size > table.tokens
            on_tail = partial and page.tier is Tier.DISK
            values += self.tails[table.tail] if on_tail else self.stored[page]
        return values[: table.tokens]

    def check(self) -> None:
        pools = self.pools
        owners = Counter(page for table in pools.tables.values() for page in table.pages)
        for page, count in owners.items():
            assert pools.owners(page) == count
        held = set(pools._copies._read) | set(pools._copies.being_read)
        assert not held & owners.keys()
        for tier, count in pools.capacity.items():
            mine = sum(page.tier is tier for page in [*owners, *held])
            assert (
                mine + pools.free_pages(tier) == count == mine + len(set(pools._free.get(tier, [])))
            )
            assert self.used[tier] == mine
        tails = [table.tail for table in pools.tables.values() if table.tail is not None]
        loose = pools._free_tails + pools._copies._read_tails + pools._copies._tails_being_read
        assert sorted(tails + loose) == list(range(pools.tails))
        for tier, most in pools.largest_table.items():
            for table in pools.tables.values():
                assert sum(page.tier is tier for page in table.pages) <= most


@pytest.mark.parametrize("seed", range(25))
def test_random_operations_against_a_dictionary(seed):
    """5 000 operations: no page lost or leaked, counts right, every sequence reads its own."""
    model = Model(seed)
    computed: dict[int, int] = {}
    for number in range(5000):
        choice, sequence = model.draw.random(), model.draw.randrange(12)
        there = sequence in model.expected
        if choice < 0.12 and there:
            model.release(sequence)
            computed.pop(sequence, None)
        elif choice < 0.3 and not there and model.expected:
            parent = model.draw.choice(list(model.expected))
            if computed.get(parent) == len(model.expected[parent]):
                model.fork(parent, sequence)
                computed[sequence] = len(model.expected.get(sequence, []))
        elif choice < 0.45:
            if all(computed.get(n) == len(v) for n, v in model.expected.items()):
                model.move()
        elif choice < 0.65:
            model.sweep(computed)
            model.check()
            model.pools.settle()
        else:
            model.grow(sequence)
        if number % 7 == 0:
            model.check()
    for sequence in list(model.expected):
        model.release(sequence)
    model.pools.take_copies()
    model.pools.settle()
    assert model.pools.total_free == sum(model.pools.capacity.values())
    assert set(model.used.values()) <= {0}


@pytest.mark.parametrize("keeps_recent", [False, True])
def test_a_child_may_have_as_many_staged_pages_as_its_parent(keeps_recent):
    """A page that is replaced by a copy does not count beside the copy."""
    pools = PagePools({Tier.DISK: 20}, 4, {Tier.DISK: 3}, 4, keeps_recent=keeps_recent)
    assert pools.allocate(0, 11)
    assert pools.fork(0, 1, 10, 11) == 10
    assert len(pools.tables[1].pages) == 3
