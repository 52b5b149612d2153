"""Where the KV pages of a sequence lie (no torch).

A page holds the keys and values of `page_tokens` consecutive positions of one layer. A sequence's
table is valid in every layer: page 7 of layer 0 and page 7 of layer 31 are of the same positions.
The pages of one sequence may lie on all tiers at once (vLLM's block tables, one pool per tier).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from offload.tiers import Tier


class Page(NamedTuple):
    """Where a page lies."""

    tier: Tier
    number: int


class PageCopy(NamedTuple):
    """What has to be in `target` before rows of the next sweep read it, or add to it."""

    source: Page
    target: Page
    from_tail: int | None = None
    """The source is on DISK and not full: what it holds is at this place in RAM. The same for …"""
    to_tail: int | None = None
    """… the target."""
    first: bool = False
    """Of two pages at each tail, these are the first ones of their sequences."""


@dataclass(slots=True)
class PageTable:
    """The pages of one sequence."""

    pages: list[Page] = field(default_factory=list)
    tail: int | None = None
    """With pages on DISK, which takes whole ones: the place in RAM of a page that is not full. With
    packed pages that of two pages on DEVICE: the first and the newest one."""
    tokens: int = 0
    """Positions that it has pages for: after a sweep, those with keys and values."""
    room: int = 0
    """Positions that it may have without another page, or a copy of one that others have, too."""

    def by_tier(self, count: int, first: int = 0) -> dict[Tier, tuple[list[int], list[int]]]:
        """Numbers and places of pages from `first` to `count`, for every tier that some are on.

        The tiers come in one order, whatever the table.
        """
        found: dict[Tier, tuple[list[int], list[int]]] = {tier: ([], []) for tier in Tier}
        for index, page in enumerate(self.pages[first:count], first):
            numbers, places = found[page.tier]
            numbers.append(page.number)
            places.append(index)
        return {tier: lists for tier, lists in found.items() if lists[0]}
