"""Facts about KV pages, their tables and their pools."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from offload.pages import PagePools
from offload.tiers import Tier


def test_pages_for_rounds_up():
    """Positions take whole pages."""
    pools = PagePools({Tier.DEVICE: 4}, 16)
    assert [pools.pages_for(tokens) for tokens in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_a_sequence_has_enough_pages_on_one_tier():
    """A table names distinct pages of one tier, enough for all positions."""
    pools = PagePools({Tier.DEVICE: 4, Tier.HOST: 2}, 16)
    assert pools.allocate(3, 33)
    table = pools.tables[3]
    assert (table.tier, len(set(table.pages))) == (Tier.DEVICE, 3)
    assert (pools.free_pages(Tier.DEVICE), pools.free_pages(Tier.HOST)) == (1, 2)


def test_a_full_pool_refuses_and_changes_nothing():
    """Without room on any tier nothing is taken, and a released table makes room again."""
    pools = PagePools({Tier.DEVICE: 2}, 4)
    assert pools.allocate(0, 5)
    assert not pools.allocate(1, 1)
    assert 1 not in pools.tables
    pools.release(0)
    assert pools.allocate(1, 8)


def test_the_split_between_tiers_is_kept():
    """Sequences go to the tier with the largest free share, so tiers fill at the same rate."""
    pools = PagePools({Tier.DEVICE: 10, Tier.HOST: 30}, 4)
    for sequence in range(20):
        assert pools.allocate(sequence, 4)
    counts = Counter(table.tier for table in pools.tables.values())
    assert counts == {Tier.DEVICE: 5, Tier.HOST: 15}


def test_staging_bounds_a_table():
    """A sequence that could not pass the staging goes to another tier, or is refused for good."""
    pools = PagePools({Tier.DEVICE: 4, Tier.HOST: 100}, 4, {Tier.HOST: 3})
    assert pools.allocate(0, 16)
    assert pools.tables[0].tier is Tier.DEVICE
    assert not pools.allocate(1, 16)
    assert pools.allocate(1, 12)
    assert pools.tables[1].tier is Tier.HOST
    assert pools.fits_ever(16)
    assert not pools.fits_ever(17)


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_against_a_dictionary(seed):
    """No page is ever in two tables or lost, and every change is reported."""
    draw = random.Random(seed)
    capacity = {Tier.DEVICE: draw.randint(0, 20), Tier.HOST: draw.randint(1, 20)}
    limits = {Tier.HOST: draw.randint(1, 10)} if draw.random() < 0.5 else {}
    used: Counter[Tier] = Counter()
    pools = PagePools(capacity, draw.randint(1, 5), limits)
    pools.on_change = lambda tier, pages: used.update({tier: pages})
    held: dict[int, tuple[Tier, frozenset[int]]] = {}
    for sequence in range(400):
        if held and draw.random() < 0.5:
            gone = draw.choice(sorted(held))
            pools.release(gone)
            del held[gone]
        tokens = draw.randint(1, 40)
        needed = pools.pages_for(tokens)
        free = {t: n - sum(len(p) for u, p in held.values() if u is t) for t, n in capacity.items()}
        room = [t for t, n in free.items() if needed <= min(n, limits.get(t, n))]
        assert pools.allocate(sequence, tokens) == bool(room)
        if room:
            table = pools.tables[sequence]
            assert table.tier in room
            assert len(table.pages) == needed
            held[sequence] = (table.tier, frozenset(table.pages))
        check_against(pools, capacity, held, used)


def check_against(pools, capacity, held, used):
    assert {s: (t.tier, frozenset(t.pages)) for s, t in pools.tables.items()} == held
    for tier, count in capacity.items():
        pages = [page for where, table in held.values() if where is tier for page in table]
        assert len(pages) == len(set(pages)) == used[tier]
        assert all(0 <= page < count for page in pages)
        assert pools.free_pages(tier) == count - len(pages)
