"""A sweep of one micro-batch and the seconds of its parts, as if the whole model had run."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from offload.timeline import COMPUTE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexrun.plan import SweepPlan
    from offload.timeline import Interval


class Timed(NamedTuple):
    """What was computed, and what it took."""

    rows: int
    read: int
    """Positions that single rows attend to, in sum."""
    positions: int
    """That prompts' rows attend to."""
    seconds: float
    """Before the first layer and in all layers of the model, of which only some have run."""
    head: float
    """Seconds of the output head."""
    program: float
    """Seconds between layers, of all of the model, in which the device waited for the program."""
    around: float
    """Seconds before and after them, with the choice of tokens."""
    wall: float
    """Seconds that the sweep really took, with the layers that ran."""

    @property
    def whole(self) -> float:
        """Seconds of the sweep, were it one of the whole model."""
        return self.seconds + self.head + self.program + self.around


def timed(
    plan: SweepPlan, intervals: Sequence[Interval], counts: Sequence[float], wall: float
) -> Timed:
    """A sweep of `plan` that took `wall` seconds, with `intervals` of the device.

    The layers that ran stand for `counts` layers of the model, in order; the head follows them.
    """
    single = [span for span in plan.spans if span.length == 1]
    many = [span for span in plan.spans if span.length > 1]
    found = sorted((each for each in intervals if each.row == COMPUTE), key=lambda one: one.start)
    layers, head, program, before = 0.0, 0.0, 0.0, found[0].start
    for each, unit in zip(found, _units(found)):
        # A unit is as often there as its layer, with its weights and what it waits for.
        count = counts[unit] if 0 <= unit < len(counts) else 1.0
        if unit == len(counts) and each.name.startswith("unit"):
            head += each.end - each.start
        else:
            layers += (each.end - each.start) * count
        program += max(0.0, each.start - before) * count
        before = max(before, each.end)
    inside = before - found[0].start
    return Timed(
        rows=plan.rows,
        read=sum(span.end for span in single),
        positions=sum(s.length * (2 * s.start + s.length + 1) // 2 for s in many),
        seconds=layers,
        head=head,
        program=program,
        around=max(0.0, wall - inside),
        wall=wall,
    )


def _units(intervals: Sequence[Interval]) -> list[int]:
    """The number of the unit that each belongs to: its own, or the next one's; -1 at the start."""
    numbers, number = [], -1
    for each in reversed(intervals):
        kind, _, rest = each.name.partition(" ")
        if kind == "unit":
            number = int(rest.split(",")[0])
        numbers.append(number if kind in ("unit", "weights") else -1)
    return numbers[::-1]


def median(sweeps: list[Timed]) -> Timed:
    """Of sweeps with the same rows: each of their times by itself."""
    last = sweeps[-1]
    times = zip(*(each[3:] for each in sweeps))
    return Timed(last.rows, last.read, last.positions, *map(statistics.median, times))
