"""What every batch scheduler is made of: who runs, who waits, and pages for their rows (no torch).

Plain data in, plain data out. `schedulers.py` has the ways to fill a sweep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexrun.micro_batches import Cutter
from flexrun.plan import RowSpan, SweepPlan, SweepRows
from flexrun.preemption import Preemption
from flexrun.progress import Progress, WaitingQueue
from flexrun.speculation import Speculation
from flexrun.turnover import Turnover
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload.pages import PagePools

MOST_PROMOTED = 16
"""Pages that move to DEVICE in one sweep: few enough to hide beside what it moves anyway."""


class BatchScheduler:
    """Sequences that run and that wait; subclasses say which of them get rows in a sweep.

    A prompt that does not fit into what is left of the budget, or into one micro-batch, is computed
    in chunks over several sweeps. Sequences take pages as they need them. When there are none left,
    those that came last give theirs to those that came before and wait; what they had computed
    moves to another tier meanwhile, or is computed again, as a prompt, when they go on.
    """

    def __init__(
        self,
        pools: PagePools,
        *,
        max_rows: int,
        max_sequences: int,
        micro_batch_rows: int,
        num_micro_batches: int | None = None,
        order: str = "input",
    ) -> None:
        self.pools = pools
        self.max_rows = max_rows
        self.max_sequences = max_sequences
        self.cutter = Cutter(pools, micro_batch_rows, num_micro_batches)
        self.running: dict[int, Progress] = {}
        """In the order in which they joined."""
        self.prompts: dict[int, Progress] = {}
        """Those of them whose prompts are computed in part."""
        self.waiting = WaitingQueue(order)
        self.free_rows: int | None = None
        """Rows of a sweep that cost nothing: they compute while its weights arrive. If it is known,
        prompts take no more, unless places would stay empty."""
        self.speculation = Speculation(pools, self.cutter, most_logits=micro_batch_rows)
        self.preemption = Preemption(pools)
        self.promoted_from: Sequence[Tier] = ()
        """Tiers, the slowest first, whose pages cross a link in every sweep."""
        self.turnover = Turnover()
        self.promotions = 0
        """Pages that moved up."""
        self._sweeps = 0

    def add(
        self,
        sequence: int,
        prompt_tokens: int,
        most_tokens: int,
        group: int | None = None,
        computed: int = 0,
    ) -> None:
        """Queue a sequence; `most_tokens` includes its prompt, which all of a `group` share.

        Keys and values of its first `computed` positions come from elsewhere, when it joins.
        """
        # Each computes its prompt's last row itself: that gives its first token.
        shared, key = (0, sequence) if group is None else (prompt_tokens - 1, group)
        progress = Progress(sequence, prompt_tokens, most_tokens, shared, key, computed, computed)
        if not (self.running or self.waiting):
            self.turnover = Turnover()  # another job's sequences may be quite different
        self.waiting.add(progress)
        self.turnover.add(progress)

    def next_sweep(self, drafts: Mapping[int, int] | None = None) -> SweepPlan:
        """Rows of the next sweep; empty when nothing is left to do.

        `drafts` has the number of guessed tokens of sequences that generate.
        """
        self.pools.settle()
        self._promote()
        sweep = SweepRows(self.max_rows)
        if not self.prompts and (victim := self.preemption.victim(self.running)) is not None:
            self.preempt(victim, swap=True)
        self.fill(sweep)
        if drafts:
            free = self.pools.total_free - self.watermark()
            self.speculation.add(sweep, drafts, self.running, free)
        micro_batches = self.cutter.cut(sweep.spans, sweep.rows)
        return SweepPlan(micro_batches, last=self._is_last(sweep.spans))

    def fill(self, sweep: SweepRows) -> None:
        """Choose rows: `decode`, `continue_prompts` and `admit`, in the order of the subclass."""
        raise NotImplementedError

    def commit(self, plan: SweepPlan, accepted: Mapping[int, int] | None = None) -> None:
        """The rows of `plan` were computed, and who wanted logits has a token more.

        `accepted`: how many of a sequence's guessed tokens were right.
        """
        self._sweeps += 1
        running, prompts, sweeps = self.running, self.prompts, self._sweeps
        for batch in plan.micro_batches:
            for sequence, start, length, wants_logits, drafts in batch.spans:
                progress = running[sequence]
                progress.computed = start + length
                if not wants_logits or length - drafts > 1:
                    progress.prompt_rows += length - drafts
                progress.last_sweep = sweeps
                if wants_logits:
                    self.turnover.generated += 1
                    progress.generated += 1
                    progress.tokens += 1
                    prompts.pop(sequence, None)
                if drafts:
                    right = (accepted or {}).get(sequence, 0)
                    progress.computed -= drafts - right
                    progress.tokens += right

    def finish(self, sequence: int) -> None:
        """`sequence` is over: its pages are free for the next sweep."""
        self.prompts.pop(sequence, None)
        if (progress := self.running.pop(sequence, None)) is None:
            self.waiting.remove(sequence)
        else:
            self.turnover.end(progress)
        if sequence in self.pools.tables:  # also of one that waits, if it was swapped
            self.pools.release(sequence)

    def decode(self, sweep: SweepRows) -> None:
        """A row for each running sequence with its next token to compute, which take turns if not
        all fit; those that joined in this sweep have theirs.
        """
        running, allocate = self.running, self.pools.allocate
        others = {*self.prompts, *(span.sequence for span in sweep.spans)}
        ready = [each for sequence, each in running.items() if sequence not in others]
        if len(ready) > sweep.left:
            ready.sort(key=lambda progress: progress.last_sweep)
        for progress in ready:
            if not sweep.left:
                break
            sequence, start = progress.sequence, progress.computed
            if sequence not in running:
                continue  # it gave its pages away a moment ago
            span = RowSpan(sequence, start, 1, True)
            if allocate(sequence, start + 1) or self._make_room(span, sweep.spans):
                sweep.add(span)

    def continue_prompts(self, sweep: SweepRows) -> None:
        """More rows of prompts that are being computed, those first that have waited longest."""
        for progress in sorted(self.prompts.values(), key=lambda progress: progress.last_sweep):
            if sweep.left and progress.sequence in self.prompts:
                span = self._span(progress, sweep.left)
                if self._make_room(span, sweep.spans):
                    sweep.add(span)

    def admit(self, sweep: SweepRows) -> None:
        """Sequences that wait, in their order, while there are places, rows and pages for them."""
        if not (self.waiting and sweep.left and self.places):
            return
        free = self.pools.total_free - self.watermark()
        later: list[Progress] = []
        # Who waits for its group has a place: else others would fill it until the group is over.
        while self.waiting and sweep.left and self.places > len(later):
            progress = self.waiting.pop()
            ready = progress.swapped or self._begin(progress)
            free -= self.pages_wanted(progress)
            if not ready:
                free += progress.shared // self.pools.page_tokens
                later.append(progress)  # its prompt is being computed
                continue
            # Copies of the last page that it shares, and of the first one.
            free -= int(progress.computed % self.pools.page_tokens > 0)
            free -= int(self.pools.keeps_recent and progress.computed >= self.pools.page_tokens)
            span = self._span(progress, sweep.left)
            enough = free >= 0 or not self.running
            if not (enough and self.preemption.pages_for(progress, span.end)):
                if not progress.swapped:
                    self.preemption.forget(progress)
                later.append(progress)
                break  # in order: a short one must not overtake for ever a long one
            self.running[progress.sequence] = progress
            if not span.wants_logits:
                self.prompts[progress.sequence] = progress
            sweep.add(span)
        for progress in reversed(later):
            self.waiting.put_back(progress)

    @property
    def places(self) -> int:
        """Sequences that may join."""
        return self.max_sequences - len(self.running)

    def pages_wanted(self, progress: Progress) -> int:
        """Pages that a sequence does not have yet, for what is kept free for it."""
        table = self.pools.tables.get(progress.sequence)
        held = 0 if table is None or progress.swapped else len(table.pages)
        return self.pages_kept(progress) - held

    def pages_kept(self, progress: Progress) -> int:
        """For all its tokens and some more."""
        return self.pools.pages_for(progress.tokens) + 1

    def watermark(self) -> int:
        """Pages that nobody new may take: the rest of begun prompts', and soon one for everyone."""
        return len(self.running) + sum(self.pages_wanted(p) - 1 for p in self.prompts.values())

    def _is_last(self, spans: list[RowSpan]) -> bool:
        """Whether every sequence there is reaches its most tokens with this sweep."""
        if self.waiting or len(spans) < len(self.running):
            return False
        running = self.running.values()
        return all(progress.tokens + 1 >= progress.most_tokens for progress in running) and all(
            span.wants_logits for span in spans
        )

    def _make_room(self, span: RowSpan, chosen: list[RowSpan]) -> bool:
        """Pages for a running sequence's rows, if need be those of sequences that came after it."""
        if self.pools.allocate(span.sequence, span.end):
            return True
        order = list(self.running)
        later = order[order.index(span.sequence) + 1 :]
        riding = {each.sequence for each in chosen}
        for victim in reversed([sequence for sequence in later if sequence not in riding]):
            self.preempt(victim)
            if self.pools.allocate(span.sequence, span.end):
                return True
        return False  # it waits until one that came before it has ended

    def preempt(self, sequence: int, *, swap: bool = False) -> None:
        """Take the pages of a running sequence away; it goes on as one of those that wait.

        With `swap` they move to the swap tier, if there is room for them.
        """
        progress = self.running.pop(sequence)
        self.prompts.pop(sequence, None)
        self.preemption.take_pages(progress, swap=swap)
        self.waiting.put_back(progress)

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
        progress.computed = self.pools.fork(*numbers, progress.shared, there.computed)
        return True

    def _promote(self) -> None:
        """When nothing waits for pages, full ones move up to where more are free than are wanted.

        A page that moves crosses a link once, and one that stays in every sweep.
        """
        if self.waiting or not self.promoted_from:
            return
        spare = self.pools.free_pages(Tier.DEVICE) - self.watermark()
        pages = ((tier, self.pools.capacity.get(tier, 0)) for tier in self.promoted_from)
        if spare <= 0 or all(self.pools.free_pages(tier) == count for tier, count in pages):
            return
        tables = [(p, self.pools.tables[p.sequence].pages) for p in self.running.values()]
        full = [page for p, pages in tables for page in self.pools.movable(pages, p.computed)]
        slow = [page for tier in self.promoted_from for page in full if page.tier is tier]
        chosen = list(dict.fromkeys(slow))[: max(0, min(spare, MOST_PROMOTED))]
        self.promotions += len(self.pools.move(dict.fromkeys(chosen, Tier.DEVICE)))

    def _span(self, progress: Progress, budget: int) -> RowSpan:
        length = min(progress.pending, budget, self.cutter.most_rows)
        return RowSpan(progress.sequence, progress.computed, length, length == progress.pending)
