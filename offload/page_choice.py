"""Which tiers new KV pages of a sequence come from (no torch)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload.page_table import Page
    from offload.tiers import Tier


def choose_tiers(
    pages: Sequence[Page],
    count: int,
    free: Mapping[Tier, int],
    capacity: Mapping[Tier, int],
    largest_table: Mapping[Tier, int],
) -> list[Tier] | None:
    """A tier for each of `count` pages of a sequence that has `pages`; None without room.

    Each time the one with the largest `free` share that may hold another one of the sequence's.
    """
    if len(free) == 1 and not largest_table:
        (tier,) = free
        return [tier] * count if count <= free[tier] else None
    left, held = dict(free), Counter(page.tier for page in pages) if count > 0 else Counter()
    chosen = []
    for _ in range(count):
        room = [
            tier
            for tier, pages_left in left.items()
            if pages_left and held[tier] < largest_table.get(tier, capacity[tier])
        ]
        if not room:
            return None
        tier = max(room, key=lambda each: left[each] / capacity[each])
        left[tier] -= 1
        held[tier] += 1
        chosen.append(tier)
    return chosen
