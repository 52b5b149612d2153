"""Cutting a sweep's rows into micro-batches that are about as much work (no torch)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from operator import attrgetter
from typing import TYPE_CHECKING

from flexrun.plan import MicroBatch
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flexrun.plan import RowSpan
    from offload.pages import PagePools

_work = attrgetter("length", "start")


@dataclass(slots=True)
class Cutter:
    """Deals rows out to micro-batches.

    All rows of a sequence ride in one of them: the next one's KV pages are fetched before this
    one's new keys and values are stored.
    """

    pools: PagePools
    most_rows: int
    """Of one micro-batch."""
    wanted: int | None = None
    """Micro-batches of a sweep that has as many sequences; None: as few as hold its rows."""
    rows_stay_on_host: bool = False
    """Single rows attend to pages on HOST there: these need no room in staging."""

    def cut(self, spans: Sequence[RowSpan], rows: int) -> tuple[MicroBatch, ...]:
        """Micro-batches of about as many of the `rows` in all, and of as much context.

        The longest spans are dealt out first, each to the micro-batch with the fewest rows so far
        (longest processing time first), unless the pages on their way to it would exceed staging.
        """
        count = min(max(-(-rows // self.most_rows), self.wanted or 1), len(spans))
        staging = _Staging(self) if self.pools.largest_table else None
        if count <= 1 and staging is None:
            return (MicroBatch(tuple(spans)),) if spans else ()
        shares: list[list[RowSpan]] = [[] for _ in range(count)]
        least = [(0, 0, number) for number in range(count)]  # a heap: rows, context, which share
        for span in sorted(spans, key=_work, reverse=True):
            full = []
            while least[0][0] + span.length > self.most_rows or (
                staging is not None and not staging.has_room(least[0][2], span)
            ):
                full.append(heappop(least))
                if not least:
                    least.append((0, 0, len(shares)))
                    shares.append([])
                    break
            filled, context, number = least[0]
            shares[number].append(span)
            heapreplace(least, (filled + span.length, context + span.end, number))
            if staging is not None:
                staging.take(number, span)
            for each in full:
                heappush(least, each)
        return tuple(MicroBatch(tuple(share)) for share in shares if share)


class _Staging:
    """Pages that travel for each micro-batch, held against what the tiers' staging takes."""

    def __init__(self, cutter: Cutter) -> None:
        self._cutter = cutter
        self._pages: dict[int, Counter[Tier]] = {}

    def has_room(self, number: int, span: RowSpan) -> bool:
        held = self._pages.setdefault(number, Counter())
        limits = self._cutter.pools.largest_table
        return all(held[tier] + n <= limits[tier] for tier, n in self._staged(span).items())

    def take(self, number: int, span: RowSpan) -> None:
        self._pages.setdefault(number, Counter()).update(self._staged(span))

    def _staged(self, span: RowSpan) -> Mapping[Tier, int]:
        """Pages of one span per tier, where staging is a limit to them."""
        pools = self._cutter.pools
        pages = pools.tables[span.sequence].pages
        if pools.keeps_recent:
            travelling = pools.movable(pages, span.start)
        else:
            travelling = pages[: pools.pages_for(span.end)]
        count = Counter(page.tier for page in travelling)
        if self._cutter.rows_stay_on_host and span.length == 1:
            del count[Tier.HOST]
        return {tier: count[tier] for tier in pools.largest_table}
