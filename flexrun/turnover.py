"""How fast sequences follow each other in their places, from those so far (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexrun.progress import Progress


@dataclass(slots=True)
class Turnover:
    """Counts of a job's sequences."""

    _added_prompts: int = 0
    """Rows of their prompts, …"""
    _most: int = 0
    """… and the most tokens that they may generate."""
    generated: int = 0
    """Rows that chose a token: one for each sequence that generates and each sweep."""
    _ended: int = 0
    _prompts: int = 0
    """Rows of the prompts of those that have ended."""
    _tokens: int = 0
    """Of the same sequences: prompts and what was generated."""

    def add(self, progress: Progress) -> None:
        """One more sequence."""
        self._added_prompts += progress.prompt - progress.shared
        self._most += progress.most_tokens - progress.tokens

    def end(self, progress: Progress) -> None:
        """A sequence that had a place is over."""
        self._ended += 1
        self._prompts += progress.prompt
        self._tokens += progress.tokens

    @property
    def tokens(self) -> float:
        """Of a sequence when it ends, on average; 0 while none has ended."""
        return self._tokens / self._ended if self._ended else 0.0

    def prompt_rows(self, places: float) -> float:
        """Rows of prompts in each sweep that keep so many `places` generating.

        A sequence generates in generated / ended sweeps, counting also what those have generated
        that go on: lifetimes that are not over yet, as reliability theory estimates them. In each
        sweep places / (generated / ended) places fall free, and each takes prompts / ended rows.
        At the beginning these are too few to tell, but no sequence generates more than it may.
        """
        least = self._added_prompts / self._most if self._most else 0.0
        so_far = self._prompts / self.generated if self.generated else 0.0
        return places * max(least, so_far)
