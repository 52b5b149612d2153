"""How a sequence gives its pages to those that came before it (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexrun.progress import Progress
    from offload.pages import PagePools


def _never(tokens: int) -> bool:
    return False


@dataclass(slots=True)
class Preemption:
    """A sequence that has to wait has its pages on the swap tier, or computes them again later."""

    pools: PagePools
    swapping_is_cheaper: Callable[[int], bool] = _never
    """For a sequence of so many computed positions."""
    count: int = 0
    """How often a running sequence had to give its pages away, …"""
    swaps: int = 0
    """… and how often they moved to the swap tier then."""

    def forget(self, progress: Progress) -> None:
        """Give all pages back. What was handed over, and is in none yet, is still computed."""
        progress.computed, progress.swapped = progress.handed_over, False
        if progress.sequence in self.pools.tables:
            self.pools.release(progress.sequence)

    def take_pages(self, progress: Progress, *, swap: bool) -> None:
        """The sequence has stopped to run. What is on a page that is not full is computed again."""
        tokens = progress.computed // self.pools.page_tokens * self.pools.page_tokens
        self.count += 1
        if swap and tokens and self.pools.can_swap_out(progress.sequence):
            self.pools.swap_out(progress.sequence, tokens)
            progress.computed, progress.swapped = tokens, True
            self.swaps += 1
        else:
            self.forget(progress)

    def victim(self, running: dict[int, Progress]) -> int | None:
        """Who came last, if its pages should move away while this sweep runs, or None.

        That is, if running sequences have the pages for their next tokens, but not for those after
        them. Who comes later than that is found without pages, and has to be computed again.
        """
        free = self.pools.total_free
        if self.pools.swap is None or len(running) < 2 or free >= 2 * len(running):
            return None
        room = {number: self.pools.tables[number].room for number in running}
        going_on = [each for each in running.values() if each.tokens + 1 < each.most_tokens]
        now = sum(room[each.sequence] <= each.computed for each in running.values())
        soon = sum(room[each.sequence] == each.computed + 1 for each in going_on)
        last = next(reversed(running.values()))
        short = now <= free < now + soon and last.tokens + 1 < last.most_tokens
        worth = short and self.pools.can_swap_out(last.sequence)
        return last.sequence if worth and self.swapping_is_cheaper(last.computed) else None

    def pages_for(self, progress: Progress, tokens: int) -> bool:
        """Pages for a sequence that joins, those that moved away back in their place."""
        if progress.swapped:
            progress.swapped = not self.pools.swap_in(progress.sequence, tokens)
            return not progress.swapped
        if not self.pools.allocate(progress.sequence, tokens):
            return False
        progress.handed_over = 0
        return True
