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
    found = [each for each in intervals if each.row == COMPUTE]
    more, layers, head = sum(counts) / len(counts), 0.0, 0.0
    for _, name, start, end, _ in found:
        kind, _, unit = name.partition(" ")
        number = int(unit.split(",")[0]) if kind == "unit" else -1
        if number == len(counts):
            head += end - start
        elif number >= 0:
            layers += (end - start) * counts[number]
        elif kind == "weights":
            layers += (end - start) * more
        else:
            layers += end - start
    computing = sum(each.end - each.start for each in found)
    inside = max(each.end for each in found) - min(each.start for each in found)
    return Timed(
        rows=plan.rows,
        read=sum(span.end for span in single),
        positions=sum(s.length * (2 * s.start + s.length + 1) // 2 for s in many),
        seconds=layers,
        head=head,
        program=max(0.0, inside - computing) * more,
        around=max(0.0, wall - inside),
        wall=wall,
    )


def median(sweeps: list[Timed]) -> Timed:
    """Of sweeps with the same rows: each of their times by itself."""
    last = sweeps[-1]
    times = zip(*(each[3:] for each in sweeps))
    return Timed(last.rows, last.read, last.positions, *map(statistics.median, times))
