"""How fast sequences follow each other in their places, from those so far (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexrun.progress import Progress


@dataclass(slots=True)
class Turnover:
    """Counts of a job's sequences."""

    generated: int = 0
    """Rows that chose a token: one for each sequence that generates and each sweep."""
    _prompts: int = 0
    """Rows of the prompts of all sequences, …"""
    _most: int = 0
    """… and the most tokens that they may generate."""
    _ended: int = 0
    _prompt_rows: int = 0
    """That those which have ended took, …"""
    _held: float = 0.0
    """… and the tokens they held pages for, on average over the sweeps in which they generated."""

    def add(self, progress: Progress) -> None:
        """One more sequence. Of a group's prompt, the first one computes what is shared."""
        self._prompts += progress.pending - _shared(progress)
        self._most += progress.most_tokens - progress.tokens

    def end(self, progress: Progress) -> None:
        """A sequence that had a place is over."""
        self._ended += 1
        self._prompt_rows += progress.prompt_rows
        self._held += progress.tokens - _shared(progress) - progress.generated / 2

    @property
    def held(self) -> float:
        """Tokens that a sequence holds pages for; 0 while none has ended."""
        return self._held / self._ended if self._ended else 0.0

    def prompt_rows(self, places: float) -> float:
        """Rows of prompts in each sweep that keep so many `places` generating.

        A sequence generates in generated / ended sweeps, counting also what those have generated
        that go on: lifetimes that are not over yet, as reliability theory estimates them. In each
        sweep places / (generated / ended) places fall free, and each takes prompt rows / ended.
        At the beginning these are too few to tell, but no sequence generates more than it may.
        """
        least = self._prompts / self._most if self._most else 0.0
        so_far = self._prompt_rows / self.generated if self.generated else 0.0
        return places * max(least, so_far)


def _shared(progress: Progress) -> int:
    return progress.shared if progress.sequence != progress.group else 0
