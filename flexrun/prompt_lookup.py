"""Guesses of a sequence's next tokens: what followed the same tokens earlier in it (no torch).

Prompt lookup decoding (Saxena, 2023). Summaries and extractions repeat their prompts word for word;
where the sweep's weights take longer to arrive than its rows to compute, a wrong guess costs
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_NGRAM, SHORTEST_NGRAM = 3, 2
"""Newest tokens that have to have been there before; the longer ones are looked for first."""
MOST_DRAFTS = 8
"""Tokens that are guessed at once."""
_FIRST_DRAFTS = 4
_LONGEST_PAUSE = 32
"""Sweeps without a guess after many wrong ones."""


class Drafter(Protocol):
    """Where drafts of one sequence come from; a small model would be another kind."""

    def propose(self, tokens: Sequence[int]) -> list[int]:
        """Tokens that may follow all of a sequence's `tokens`; none where there is no guess."""
        ...

    def learn(self, drafted: int, accepted: int) -> None:
        """Of the last proposal so many tokens were tried, and so many of them were right."""
        ...


class PromptLookup:
    """Drafts for one sequence, which only grows.

    After right guesses it drafts more tokens, after wrong ones fewer, and then it pauses.
    """

    def __init__(self) -> None:
        self._tokens = np.empty(0, np.int32)
        self._count = 0
        self._width = _FIRST_DRAFTS
        self._pause = 0
        """Proposals to leave out, …"""
        self._next_pause = 1
        """… and after the next guess of which nothing was right."""

    def propose(self, tokens: Sequence[int]) -> list[int]:
        if self._pause:
            self._pause -= 1
            return []
        known = self._extend(tokens)
        for size in range(LONGEST_NGRAM, SHORTEST_NGRAM - 1, -1):
            if len(known) > size and (start := _last_place(known, size)) is not None:
                follow: list[int] = known[start : start + self._width].tolist()
                while len(follow) < self._width:  # up to now: it repeats itself
                    follow += follow[: self._width - len(follow)]
                return follow
        return []

    def learn(self, drafted: int, accepted: int) -> None:
        if accepted:
            self._next_pause = 1
            grown = 2 * self._width if accepted == drafted else accepted + 1
            self._width = min(MOST_DRAFTS, grown)
        elif drafted:
            self._width = max(1, self._width // 2)
            self._pause = self._next_pause
            self._next_pause = min(_LONGEST_PAUSE, 2 * self._next_pause)

    def _extend(self, tokens: Sequence[int]) -> np.ndarray:
        """All tokens as an array, of which only the new ones are copied."""
        if len(tokens) > len(self._tokens):
            room = np.empty(len(tokens) * 3 // 2 + 16, np.int32)
            room[: self._count] = self._tokens[: self._count]
            self._tokens = room
        self._tokens[self._count : len(tokens)] = tokens[self._count :]
        self._count = len(tokens)
        return self._tokens[: self._count]


def _last_place(tokens: np.ndarray, size: int) -> int | None:
    """Where the tokens begin that followed the last `size` ones, the last time these were there."""
    newest = tokens[-size:]
    found = np.ones(len(tokens) - size, bool)
    for offset in range(size):
        found &= tokens[offset : len(found) + offset] == newest[offset]
    places = np.flatnonzero(found)
    return int(places[-1]) + size if len(places) else None
