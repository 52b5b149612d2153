"""Which rows ride in the next sweep: plain data in, plain data out (no torch)."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexrun.plan import MicroBatch, RowSpan, SweepPlan
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from offload.pages import PagePools

MOST_PROMOTED = 16
"""Pages that move to DEVICE in one sweep: few enough to hide beside what it moves anyway."""


@dataclass(slots=True)
class Progress:
    """What the scheduler knows of a sequence: token counts, never the tokens."""

    sequence: int
    tokens: int
    """Tokens so far: the prompt and what was generated."""
    most_tokens: int
    """Tokens the sequence may grow to."""
    shared: int = 0
    """The first positions, which are the same in all sequences of the group."""
    group: int = -1
    computed: int = 0
    """Positions whose keys and values are in the KV cache."""
    last_sweep: int = -1
    """The last sweep it had rows in."""

    @property
    def pending(self) -> int:
        return self.tokens - self.computed


class Scheduler:
    """Running sequences first, then waiting ones in order, up to the row budget of a sweep.

    A prompt that does not fit into what is left of the budget, or into one micro-batch, is computed
    in chunks over several sweeps. Sequences take pages as they need them. When there are none left,
    those that came last give theirs to those that came before and wait; what they had computed is
    computed again, as a prompt, when they go on.
    """

    def __init__(
        self,
        pools: PagePools,
        *,
        max_rows: int,
        max_sequences: int,
        micro_batch_rows: int,
        num_micro_batches: int | None,
    ) -> None:
        self.pools = pools
        self.max_rows = max_rows
        self.max_sequences = max_sequences
        self.micro_batch_rows = micro_batch_rows
        self.num_micro_batches = num_micro_batches
        self.running: dict[int, Progress] = {}
        self.waiting: deque[Progress] = deque()
        self.preemptions = 0
        """How often a running sequence had to give its pages away."""
        self.promoted_from: Sequence[Tier] = ()
        """Tiers, the slowest first, whose pages cross a link in every sweep."""
        self.promotions = 0
        """Pages that moved up."""
        self.rows_stay_on_host = False
        """Single rows attend to pages on HOST there: these need no room in staging."""
        self._sweeps = 0

    def add(
        self, sequence: int, prompt_tokens: int, most_tokens: int, group: int | None = None
    ) -> None:
        """Queue a sequence; `most_tokens` includes its prompt, which all of a `group` share."""
        # Each computes its prompt's last row itself: that gives its first token.
        shared = 0 if group is None else prompt_tokens - 1
        number = sequence if group is None else group
        self.waiting.append(Progress(sequence, prompt_tokens, most_tokens, shared, number))

    def next_sweep(self) -> SweepPlan:
        """Rows of the next sweep; empty when nothing is left to do."""
        self.pools.settle()
        self._promote()
        spans: list[RowSpan] = []
        budget = self.max_rows
        # A decode is never held up by a long prompt, and where not all fit they take turns.
        candidates = sorted(self.running.values(), key=lambda p: (p.pending > 1, p.last_sweep))
        for progress in candidates:
            if budget == 0:
                break
            if progress.sequence in self.running:  # else it gave its pages away a moment ago
                span = self._span(progress, budget)
                if self._make_room(span, spans):
                    spans.append(span)
                    budget -= span.length
        spans += self._admit(budget)
        return SweepPlan(tuple(self._cut(spans)), last=self._is_last(spans))

    def _is_last(self, spans: list[RowSpan]) -> bool:
        """Whether every sequence there is reaches its most tokens with this sweep."""
        if self.waiting or len(spans) < len(self.running):
            return False
        running = self.running.values()
        return all(span.wants_logits for span in spans) and all(
            progress.tokens + 1 >= progress.most_tokens for progress in running
        )

    def commit(self, plan: SweepPlan) -> None:
        """The rows of `plan` were computed."""
        self._sweeps += 1
        for batch in plan.micro_batches:
            for span in batch.spans:
                progress = self.running[span.sequence]
                progress.computed, progress.last_sweep = span.end, self._sweeps

    def grow(self, sequence: int) -> None:
        """One token was generated for `sequence`."""
        self.running[sequence].tokens += 1

    def finish(self, sequence: int) -> None:
        """`sequence` is over: its pages are free for the next sweep."""
        if self.running.pop(sequence, None) is not None:
            self.pools.release(sequence)
        else:
            self.waiting = deque(p for p in self.waiting if p.sequence != sequence)

    def _make_room(self, span: RowSpan, chosen: list[RowSpan]) -> bool:
        """Pages for a running sequence's rows, if need be those of sequences that came after it."""
        if self.pools.allocate(span.sequence, span.end):
            return True
        order = list(self.running)
        later = order[order.index(span.sequence) + 1 :]
        riding = {each.sequence for each in chosen}
        for victim in reversed([sequence for sequence in later if sequence not in riding]):
            self._preempt(victim)
            if self.pools.allocate(span.sequence, span.end):
                return True
        return False  # it waits until one that came before it has ended

    def _preempt(self, sequence: int) -> None:
        progress = self.running.pop(sequence)
        self._forget(progress)
        self.waiting.appendleft(progress)
        self.preemptions += 1

    def _admit(self, budget: int) -> Iterator[RowSpan]:
        if not self.waiting:
            return
        # What runs will want the rest of its prompts, and soon a page more each.
        free = self.pools.total_free - sum(map(self._pages_wanted, self.running.values()))
        later: list[Progress] = []
        # Who waits for its group has a place: else others would fill it until the group is over.
        while self.waiting and budget > 0 and len(self.running) + len(later) < self.max_sequences:
            progress = self.waiting.popleft()
            ready = self._begin(progress)
            free -= self._pages_wanted(progress)
            if not ready:
                free += progress.shared // self.pools.page_tokens
                later.append(progress)  # its prompt is being computed
                continue
            if progress.computed % self.pools.page_tokens:
                free -= 1  # a copy of the last page that it shares
            span = self._span(progress, budget)
            enough = free >= 0 or not self.running
            if not (enough and self.pools.allocate(progress.sequence, span.end)):
                self._forget(progress)
                later.append(progress)
                break  # in order: a short one must not overtake for ever a long one
            self.running[progress.sequence] = progress
            budget -= span.length
            yield span
        self.waiting.extendleft(reversed(later))

    def _begin(self, progress: Progress) -> bool:
        """Share what others of its group have computed; False if they are about to compute it."""
        if not progress.shared:
            return True
        others = [each for each in self.running.values() if each.group == progress.group]
        if not others:
            return True
        there = next((each for each in others if each.computed >= progress.shared), None)
        if there is None:
            return False
        numbers = there.sequence, progress.sequence
        if self.pools.fork(*numbers, progress.shared, there.computed):
            progress.computed = progress.shared
        return True

    def _forget(self, progress: Progress) -> None:
        progress.computed = 0
        if progress.sequence in self.pools.tables:
            self.pools.release(progress.sequence)

    def _promote(self) -> None:
        """When nothing waits for pages, full ones move up to where more are free than are wanted.

        A page that moves crosses a link once, and one that stays in every sweep.
        """
        if self.waiting or not self.promoted_from:
            return
        running = self.running.values()
        spare = self.pools.free_pages(Tier.DEVICE) - sum(map(self._pages_wanted, running))
        pages = ((tier, self.pools.capacity.get(tier, 0)) for tier in self.promoted_from)
        if spare <= 0 or all(self.pools.free_pages(tier) == count for tier, count in pages):
            return
        tables = [(p, self.pools.tables[p.sequence].pages) for p in running]
        full = [
            page for p, pages in tables for page in pages[: p.computed // self.pools.page_tokens]
        ]
        slow = [page for tier in self.promoted_from for page in full if page.tier is tier]
        chosen = list(dict.fromkeys(slow))[: max(0, min(spare, MOST_PROMOTED))]
        self.promotions += len(self.pools.move(dict.fromkeys(chosen, Tier.DEVICE)))

    def _pages_wanted(self, progress: Progress) -> int:
        """Pages that a sequence does not have yet, for all its tokens and some more."""
        table = self.pools.tables.get(progress.sequence)
        held = 0 if table is None else len(table.pages)
        return self.pools.pages_for(progress.tokens) + 1 - held

    def _span(self, progress: Progress, budget: int) -> RowSpan:
        # All rows of a sequence ride in one micro-batch: the next one's KV pages are fetched before
        # this one's new keys and values are stored.
        length = min(progress.pending, budget, self.micro_batch_rows)
        whole = length == progress.pending
        return RowSpan(progress.sequence, progress.computed, length, wants_logits=whole)

    def _cut(self, spans: list[RowSpan]) -> Iterator[MicroBatch]:
        """Cut the rows, in order, into micro-batches of about equal size."""
        rows = sum(span.length for span in spans)
        count = max(-(-rows // self.micro_batch_rows), self.num_micro_batches or 1)
        batch: list[RowSpan] = []
        filled = done = number = 0
        pages = _PageCount(self.pools, self.rows_stay_on_host)
        for span in spans:
            wanted = pages.of(span)
            full = filled + span.length > self.micro_batch_rows or not pages.room_for(wanted)
            if batch and full:
                yield MicroBatch(tuple(batch))
                batch, filled, number = [], 0, number + 1
                pages.clear()
            batch.append(span)
            pages.add(wanted)
            filled += span.length
            done += span.length
            if done * count >= rows * (number + 1):
                yield MicroBatch(tuple(batch))
                batch, filled, number = [], 0, number + 1
                pages.clear()
        if batch:
            yield MicroBatch(tuple(batch))


class _PageCount:
    """Pages of a micro-batch per tier, held against what the tier's staging takes."""

    def __init__(self, pools: PagePools, rows_stay_on_host: bool) -> None:
        self._pools = pools
        self._rows_stay_on_host = rows_stay_on_host
        self._pages: Counter[Tier] = Counter()

    def of(self, span: RowSpan) -> Counter[Tier]:
        """Pages of one span, where there is a limit to them."""
        if not self._pools.largest_table:
            return Counter()
        pages = self._pools.tables[span.sequence].pages
        count = Counter(page.tier for page in pages[: self._pools.pages_for(span.end)])
        if self._rows_stay_on_host and span.length == 1:
            del count[Tier.HOST]
        return count

    def room_for(self, wanted: Counter[Tier]) -> bool:
        limits = self._pools.largest_table
        return all(self._pages[tier] + wanted[tier] <= most for tier, most in limits.items())

    def add(self, wanted: Counter[Tier]) -> None:
        self._pages.update(wanted)

    def clear(self) -> None:
        self._pages.clear()
