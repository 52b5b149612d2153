"""Rows for guessed tokens, where a sweep has rows that cost nothing (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flexrun.micro_batches import Cutter
    from flexrun.plan import RowSpan, SweepRows
    from flexrun.progress import Progress
    from offload.pages import PagePools


def right_guesses(guessed: Sequence[int], chosen: Sequence[int]) -> int:
    """How many of the first `guessed` tokens are those `chosen` in their places."""
    wrong = (place for place, token in enumerate(guessed) if token != chosen[place])
    return next(wrong, len(guessed))


@dataclass(slots=True)
class Speculation:
    """How many guessed tokens may ride."""

    pools: PagePools
    cutter: Cutter
    most_logits: int
    """Rows of a sweep that give logits, if some of them are of guessed tokens."""
    spares_host: bool = False
    """Only single rows attend to pages on HOST there: sequences with such pages get no guesses."""
    most_rows: int = 0
    """Rows of a sweep that guessed tokens may fill up; 0: none are guessed."""

    def add(
        self,
        sweep: SweepRows,
        drafts: Mapping[int, int],
        running: Mapping[int, Progress],
        free_pages: int,
    ) -> None:
        """Put as many of the `drafts` (tokens by sequence) behind their sequences' newest rows as
        there is room for; `free_pages` are those that nobody else wants soon.
        """
        rows = min(self.most_rows, sweep.most) - sweep.rows
        room = min(rows, self.most_logits - len(sweep.spans))
        for place, span in enumerate(sweep.spans):
            if room <= 0:
                break
            most = min(room, self._most(span, running[span.sequence]))
            count = min(drafts.get(span.sequence, 0), most)
            table = self.pools.tables[span.sequence]
            if count > (held := table.room - span.end):
                # At least one: where there are enough, the last is others', too, and copied.
                more = max(1, self.pools.pages_for(span.end + count) - len(table.pages))
                count, more = (count, more) if more <= free_pages else (held, 0)
                free_pages -= more
            if count > 0 and self.pools.allocate(span.sequence, span.end + count):
                sweep.spans[place] = span._replace(length=span.length + count, drafts=count)
                sweep.rows += count
                room -= count

    def _most(self, span: RowSpan, progress: Progress) -> int:
        """No more tokens than the sequence may generate, and only behind its newest one."""
        if span.length > 1 or not span.wants_logits:
            return 0
        most = min(progress.most_tokens - progress.tokens, self.cutter.most_rows) - 1
        if self.pools.tails:
            # A page is written to DISK, or packed, when it is full: its tokens have to be right.
            most = min(most, -(span.end + 1) % self.pools.page_tokens)
        if self.pools.keeps_recent and not span.end % self.pools.page_tokens:
            most = 0  # rows in two pages are attended to like a prompt's
        if self.spares_host:
            pages = self.pools.tables[span.sequence].pages
            most *= all(page.tier is not Tier.HOST for page in pages)
        return most
