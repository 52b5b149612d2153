"""Sizes of sweeps whose times tell a model's operators apart, measured in rounds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from flexrun.layer_run import Size
from flexrun.timed_sweep import median

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flexrun.layer_run import LayerRun
    from flexrun.timed_sweep import Timed

SINGLE_ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Sequences that generate, a row each."""
ATTENDING = (8, 512)
"""Sequences, of a number in the list above, and positions of each, where attention is measured."""
PROMPT = 128
"""Rows of each prompt, of which as many are computed as more rows need."""
_REPEATS = 2
"""Of a prompt's sweep each time."""
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 9
"""There has to be time for so many if another size is to be measured; and the most that there are.
"""


class Measured(NamedTuple):
    """Medians of each size."""

    own: dict[Size, Timed]
    """In the order of their rows: those that generate, and prompts."""
    held_out: dict[Size, Timed]
    rounds: int


class SizeRounds:
    """All sizes in turn, again and again: slow spells of the machine fall on all of them, and the
    median of each forgets them.

    Single rows take little, so they come once more before each size of prompts. Sizes of about as
    many rows come one after the other: a spell that outlasts one of them finds the next one, too.
    """

    def __init__(self, run: LayerRun, held_out: Sequence[Size] = ()) -> None:
        """`held_out`: measured in the same rounds, and none of the others."""
        self._run = run
        self._held_out = held_out
        own = [Size(rows, 1, generating=True) for rows in SINGLE_ROWS]
        self.attending = Size(ATTENDING[0], run.context, generating=True)
        """As many rows as one of the others, with longer contexts."""
        single = [*own, self.attending, *(size for size in held_out if size.generating)]
        self._single = sorted(single, key=lambda size: size.rows)

    def measure(self, seconds: float) -> Measured:
        """Prompts of as many rows as `seconds` have time for, of one size at least."""
        start = time.perf_counter()
        found = self._first(seconds)
        prompts = sorted((s for s in found if not s.generating), key=lambda size: size.rows)
        rounds, spent = 1, time.perf_counter() - start
        while rounds < _MOST_ROUNDS and spent * (rounds + 1) / rounds <= seconds:
            if not prompts:  # too little room for any
                self._singles(found)
            for size in prompts:
                self._singles_and_prompt(found, size)
            rounds, spent = rounds + 1, time.perf_counter() - start
        medians = {size: median(found[size]) for size in (*self._single, *prompts)}
        held_out = {size: medians.pop(size) for size in self._held_out}
        return Measured(medians, held_out, rounds)

    def _first(self, seconds: float) -> dict[Size, list[Timed]]:
        start = time.perf_counter()
        found: dict[Size, list[Timed]] = {size: [] for size in self._single}
        self._singles(found)
        of_singles = time.perf_counter() - start
        for size in self._held_out:
            if not size.generating:
                self._singles_and_prompt(found, size)
        last, fewest = found[self._single[-1]][0], len(found)
        for step in self._prompts():
            each = (_REPEATS + 1) * last.wall / last.rows
            more = sum(each * size.rows + of_singles for size in step)
            spent = time.perf_counter() - start
            if len(found) > fewest and _LEAST_ROUNDS * (spent + more) > seconds:
                break
            for size in step:
                self._singles_and_prompt(found, size)
            last = found[step[0]][0]
        return found

    def _singles(self, found: dict[Size, list[Timed]]) -> None:
        for size in self._single:
            found[size].append(self._run.timed(size, 1))

    def _singles_and_prompt(self, found: dict[Size, list[Timed]], size: Size) -> None:
        self._singles(found)
        found.setdefault(size, []).append(self._run.timed(size, _REPEATS))

    def _prompts(self) -> Iterator[list[Size]]:
        """More and more rows, in short prompts, and once in longer ones, too: what these take
        longer is attention's.
        """
        length, context = min(PROMPT, self._run.context), self._run.context
        longer = context > length
        for rows in self._run.prompt_rows:
            sizes = [Size(max(1, rows // length), length)]
            if longer and rows >= context:
                sizes.append(Size(rows // context, context))
                longer = False
            yield sizes
