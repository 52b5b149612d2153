"""Three ways to fill a sweep, behind one interface (no torch).

A sweep costs its weights' way to the device whoever rides in it. `ContinuousScheduler` is what jobs
run with; the other two are what it is held against.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flexrun.scheduler import BatchScheduler

if TYPE_CHECKING:
    from flexrun.plan import SweepRows
    from flexrun.progress import Progress
    from offload.pages import PagePools
    from policy_search.policy import Policy

LEAST_PROMPT_ROWS = 32
"""That ride in a sweep: matrix products of fewer use a processor badly."""
WORTH_SPREADING = 0.25
"""Part of the prompts' rows that has to be free. Held by simulations (see DESIGN.md)."""


class ContinuousScheduler(BatchScheduler):
    """Every sweep full: prompts ride in the sweeps of those that generate.

    A place is taken as soon as its sequence ends (Orca's iteration-level batching), and a sequence
    that generates is never held up by another one's prompt (Sarathi's stall-free batching). Prompts
    take the rows that compute while the weights arrive: more would make this sweep longer, and
    leave less to do beside the next one's weights. If these do not suffice to keep all places but
    one generating, prompts take as many as that needs: each has to be computed in some sweep, and
    empty places only make more sweeps.

    Where little is free beside the places' own rows, or nothing will wait for a place, prompts are
    computed as soon as may be: many rows at once are computed faster than the same ones in turn.
    """

    def fill(self, sweep: SweepRows) -> None:
        self.decode(sweep)
        if self.free_rows is not None:
            needed = max(LEAST_PROMPT_ROWS, math.ceil(self.prompt_rows()))
            if self._spreads(self.free_rows, needed):
                sweep.limit(max(self.free_rows, sweep.rows + needed))
        self.continue_prompts(sweep)
        self.admit(sweep)

    def _spreads(self, free: int, needed: int) -> bool:
        """Whether there will be prompts in all sweeps, of which a good part rides for nothing."""
        places = self.places_with_pages()
        if len(self.waiting) <= max(0.0, places - len(self.running)):
            return False
        return free - places >= WORTH_SPREADING * needed

    def prompt_rows(self) -> float:
        """Of prompts in a sweep, so that as many sequences generate as places and pages allow.

        All but one, whose prompt is what a sweep computes beside its weights. While fewer generate,
        more rows are needed than on average: prompts are uneven, and a queue that is served just as
        fast as it fills stays as long as it is.
        """
        wanted = max(1.0, self.places_with_pages() - 1)
        missing = max(0.0, wanted - (len(self.running) - len(self.prompts)))
        return self.turnover.prompt_rows(wanted + missing / 2)

    def places_with_pages(self) -> float:
        """Of sequences that may run, as many as there are pages for."""
        places, pools = float(self.max_sequences), self.pools
        if held := self.turnover.held:
            pages = sum(count for tier, count in pools.capacity.items() if tier is not pools.swap)
            places = min(places, pages * pools.page_tokens / held)
        return places


class PhasedScheduler(BatchScheduler):
    """One phase at a time: sweeps of prompts while any can be computed, else of single rows.

    Who joins with its prompt computed, by another machine or before it gave its place away, has a
    single row, too.
    """

    def fill(self, sweep: SweepRows) -> None:
        self.continue_prompts(sweep)
        self.admit(sweep)
        if all(span.length == 1 and span.wants_logits for span in sweep.spans):
            self.decode(sweep)


class StaticScheduler(BatchScheduler):
    """FlexGen's block: as many sequences as may run start together, and the next when all are over.

    Pages for a sequence's most tokens are kept for it. Unlike FlexGen's, the block is not padded to
    its longest prompt, and who has ended has no rows.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._ended = 0
        """Sequences of this block that are over, whose places stay empty."""
        self._whole = False
        """All prompts of the block are computed."""

    def fill(self, sweep: SweepRows) -> None:
        if not self.running:
            self._ended, self._whole = 0, False
        self.continue_prompts(sweep)
        self.admit(sweep)
        if not sweep.spans:
            self._whole = True
            self.decode(sweep)

    def finish(self, sequence: int) -> None:
        self._ended += sequence in self.running
        super().finish(sequence)

    @property
    def places(self) -> int:
        return 0 if self._whole else super().places - self._ended

    def pages_kept(self, progress: Progress) -> int:
        return self.pools.pages_for(progress.most_tokens)

    def watermark(self) -> int:
        return sum(map(self.pages_wanted, self.running.values()))


SCHEDULERS = {
    "continuous": ContinuousScheduler,
    "static": StaticScheduler,
    "phased": PhasedScheduler,
}


def make_scheduler(policy: Policy, pools: PagePools) -> BatchScheduler:
    """The one that `policy` names, with its sizes, over `pools`."""
    return SCHEDULERS[policy.scheduler](
        pools,
        max_rows=policy.max_rows,
        max_sequences=policy.max_sequences,
        micro_batch_rows=policy.micro_batch_rows,
        num_micro_batches=policy.num_micro_batches,
        order=policy.order,
    )
