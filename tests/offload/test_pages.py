"""Facts about KV pages, their tables and their pools."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from offload.page_table import Page
from offload.pages import PagePools
from offload.tiers import Tier


def test_pages_for_rounds_up():
    """Positions take whole pages."""
    pools = PagePools({Tier.DEVICE: 4}, 16)
    assert [pools.pages_for(tokens) for tokens in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_a_sequence_takes_pages_as_it_grows():
    """A table names distinct pages, as many as its positions need and no more."""
    pools = PagePools({Tier.DEVICE: 4}, 16)
    for tokens, pages in ((1, 1), (16, 1), (17, 2), (10, 2), (64, 4)):
        assert pools.allocate(3, tokens)
        assert len(set(pools.tables[3].pages)) == len(pools.tables[3].pages) == pages
        assert pools.free_pages(Tier.DEVICE) == pools.total_free == 4 - pages


def test_pages_of_a_grown_sequence_stay_in_place():
    """What a sequence has got stays where it is when it gets more."""
    pools = PagePools({Tier.DEVICE: 9, Tier.HOST: 9}, 4)
    assert pools.allocate(0, 17)
    before = list(pools.tables[0].pages)
    assert pools.allocate(0, 40)
    assert pools.tables[0].pages[:5] == before


def test_full_pools_refuse_and_change_nothing():
    """Without room nothing is taken, not even in part; a released table makes room again."""
    pools = PagePools({Tier.DEVICE: 2, Tier.HOST: 1}, 4)
    assert pools.allocate(0, 5)
    before = list(pools.tables[0].pages)
    assert not pools.allocate(1, 8)
    assert not pools.allocate(0, 13)
    assert (pools.tables[0].pages, list(pools.tables), pools.total_free) == (before, [0], 1)
    pools.release(0)
    assert pools.allocate(1, 12)


def test_the_split_between_tiers_is_kept():
    """Pages come from the tier with the largest free share, so tiers fill at the same rate."""
    pools = PagePools({Tier.DEVICE: 10, Tier.HOST: 30}, 4)
    assert pools.allocate(0, 4 * 20)
    counts = Counter(page.tier for page in pools.tables[0].pages)
    assert counts == {Tier.DEVICE: 5, Tier.HOST: 15}


def test_one_sequence_may_take_everything():
    """What is free on any tier is used before a sequence is refused."""
    pools = PagePools({Tier.DEVICE: 3, Tier.HOST: 5, Tier.DISK: 2}, 4, tails=1)
    assert pools.fits_ever(40)
    assert not pools.fits_ever(41)
    assert pools.allocate(0, 40)
    assert pools.total_free == 0


def test_staging_bounds_the_pages_of_a_tier():
    """A sequence has no more pages on a staged tier than its staging takes."""
    pools = PagePools({Tier.DEVICE: 4, Tier.HOST: 100}, 4, {Tier.HOST: 3})
    assert pools.fits_ever(28)
    assert not pools.fits_ever(29)
    assert pools.allocate(0, 28)
    counts = Counter(page.tier for page in pools.tables[0].pages)
    assert counts == {Tier.DEVICE: 4, Tier.HOST: 3}
    assert not pools.allocate(0, 29)


def test_pages_on_disk_need_a_place_for_the_one_that_fills():
    """Only as many sequences as there are tails have pages on DISK, each one a tail of its own."""
    pools = PagePools({Tier.DISK: 100, Tier.DEVICE: 5}, 4, tails=2)
    for sequence in range(2):
        assert pools.allocate(sequence, 20)
    assert {pools.tables[0].tail, pools.tables[1].tail} == {0, 1}
    free = pools.free_pages(Tier.DEVICE)
    assert pools.allocate(2, 4 * free)
    assert {page.tier for page in pools.tables[2].pages} == {Tier.DEVICE}
    assert pools.tables[2].tail is None
    assert not pools.allocate(2, 4 * free + 20)
    pools.release(0)
    assert pools.allocate(2, 4 * free + 20)


def test_pages_of_a_tier_in_table_order():
    """`by_tier` gives numbers and places of each tier's pages among the first ones."""
    pools = PagePools({Tier.DEVICE: 8, Tier.HOST: 8}, 4)
    pools.allocate(0, 64)
    pages = pools.tables[0].pages
    found = pools.tables[0].by_tier(11)
    assert list(found) == [Tier.DEVICE, Tier.HOST]
    for tier, (numbers, places) in found.items():
        assert places == sorted(places)
        assert numbers == [pages[place].number for place in places]
        assert places == [place for place in range(11) if pages[place].tier is tier]


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_against_a_dictionary(seed):
    """No page is ever in two tables or lost, and every change is reported: 5 000 operations."""
    draw = random.Random(seed)
    capacity = {Tier.DEVICE: draw.randint(0, 20), Tier.HOST: draw.randint(1, 20)}
    limits = {Tier.HOST: draw.randint(1, 10)} if draw.random() < 0.5 else {}
    tails = draw.choice([0, 1, 3])
    if tails:
        capacity[Tier.DISK] = draw.randint(1, 20)
    used: Counter[Tier] = Counter()
    pools = PagePools(capacity, draw.randint(1, 5), limits, tails)
    pools.on_change = lambda tier, pages: used.update({tier: pages})
    held: dict[int, list[Page]] = {}
    for _ in range(5000):
        sequence = draw.randrange(12)
        if sequence in held and draw.random() < 0.3:
            pools.release(sequence)
            del held[sequence]
        else:
            before = held.get(sequence, [])
            tokens = draw.randint(1, 60)
            missing = max(0, pools.pages_for(tokens) - len(before))
            expected = missing <= room(capacity, limits, tails, held, sequence)
            assert pools.allocate(sequence, tokens) == expected
            if expected:
                pages = list(pools.tables[sequence].pages)
                assert pages[: len(before)] == before
                assert len(pages) == len(before) + missing
                held[sequence] = pages
        assert {number: table.pages for number, table in pools.tables.items()} == held
        pages = [page for table in held.values() for page in table]
        assert len(pages) == len(set(pages))
        for tier, count in capacity.items():
            numbers = [page.number for page in pages if page.tier is tier]
            assert all(0 <= number < count for number in numbers)
            assert used[tier] == len(numbers) == count - pools.free_pages(tier)


def room(capacity, limits, tails, held, sequence) -> int:
    """Pages that a sequence could get, counted from the tables alone."""
    on_disk = {s for s, table in held.items() if any(p.tier is Tier.DISK for p in table)}
    total = 0
    for tier, count in capacity.items():
        if tier is Tier.DISK and sequence not in on_disk and len(on_disk) >= tails:
            continue
        free = count - sum(page.tier is tier for table in held.values() for page in table)
        own = sum(page.tier is tier for page in held.get(sequence, []))
        total += min(free, limits.get(tier, count) - own)
    return total
