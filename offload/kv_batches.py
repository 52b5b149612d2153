"""What each micro-batch of a sweep does with the pages of every tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from offload.kv_hosted import HostedRows, can_be_hosted, hosted_rows, split_spans
from offload.kv_layout import KVGroup, build_group
from offload.kv_moves import SpanPages
from offload.kv_recent import RecentRows, recent_rows, recent_span
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import torch

    from offload.pages import PagePools


class Span(Protocol):
    """Rows of one sequence in a micro-batch."""

    @property
    def sequence(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...


@dataclass(frozen=True, slots=True)
class KVBatch:
    """The pages of one micro-batch."""

    groups: list[KVGroup]
    """What the device attends to: one group per tier, in one order, in which results are merged."""
    hosted: HostedRows | None = None
    """What HOST attends to."""
    recent: RecentRows | None = None
    """What happens in the newest pages, if these are apart."""

    @property
    def attended(self) -> list[KVGroup]:
        """All that the device attends to."""
        return self.groups if self.recent is None else [*self.groups, self.recent.group]


@dataclass(slots=True)
class KVPlanner:
    """Sorts rows and pages, between two sweeps, without touching any key or value."""

    pools: PagePools
    device: torch.device
    staged: Collection[Tier]
    """Tiers whose pages move to the device, …"""
    staging_pages: int
    """… so many of one tier and micro-batch."""
    gathered_tokens: int
    page_bytes: int
    """Of one page in all layers."""
    host_share: Callable[[int], float] | None = None
    """Of so many bytes on HOST that single rows read in a sweep, the share that HOST attends to."""

    def plan(self, micro_batches: Sequence[Sequence[Span]]) -> list[KVBatch]:
        """The index tensors of a sweep's micro-batches (each a sequence of spans)."""
        found = [self._by_tier(spans) for spans in micro_batches]
        hosted: list[list[SpanPages]] = [[] for _ in found]
        if self.host_share is not None and Tier.HOST in self.staged:
            there = [s for each in found for s in each[Tier.HOST] if can_be_hosted(s)]
            pages = sum(len(span.pages) for span in there)
            share = self.host_share(pages * self.page_bytes) if pages else 0.0
            for number, each in enumerate(found):
                spans = each[Tier.HOST]
                hosted[number], each[Tier.HOST] = split_spans(spans, share, self.staging_pages)
        tokens, device = self.pools.page_tokens, self.device
        return [
            KVBatch(self._groups(by_tier), hosted_rows(there, tokens, device), self._recent(spans))
            for by_tier, there, spans in zip(found, hosted, micro_batches)
        ]

    def _recent(self, spans: Sequence[Span]) -> RecentRows | None:
        """What `spans` do in the newest pages of their sequences."""
        if not self.pools.keeps_recent:
            return None
        tokens = self.pools.page_tokens
        tables = [self.pools.tables[span.sequence] for span in spans]
        places, row = [], 0
        for span, table in zip(spans, tables):
            assert table.tail is not None
            places.append(
                recent_span(row, span.start, span.start + span.length, tokens, table.tail)
            )
            row += span.length
        return recent_rows(places, [table.pages for table in tables], tokens, self.device)

    def _by_tier(self, spans: Sequence[Span]) -> dict[Tier, list[SpanPages]]:
        by_tier: dict[Tier, list[SpanPages]] = {tier: [] for tier in Tier}
        row = 0
        for span in spans:
            table = self.pools.tables[span.sequence]
            end = span.start + span.length
            count = self.pools.pages_for(end)
            first, newest = 0, table.pages[count - 1].tier
            apart = self.pools.keeps_recent
            if apart:  # the first page, and what was not full
                first, count = 1, span.start // self.pools.page_tokens
            for tier, (pages, indices) in table.by_tier(count, first).items():
                own = newest is tier and not apart
                place = span.start, end, pages, indices, own, table.tail
                by_tier[tier].append(SpanPages(row, *place))
            row += span.length
        return by_tier

    def _groups(self, by_tier: dict[Tier, list[SpanPages]]) -> list[KVGroup]:
        return [
            build_group(
                places,
                self.pools.page_tokens,
                self.device,
                tier,
                staged=tier in self.staged,
                gathered_tokens=self.gathered_tokens,
            )
            for tier, places in by_tier.items()
            if places
        ]
