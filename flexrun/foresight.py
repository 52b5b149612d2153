"""What the cost model says of the sweeps that ran, held against what they took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from policy_search.sweep_load import SweepLoad

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flexrun.plan import RowSpan
    from policy_search.sweep_cost import SweepCost

LEAST_SECONDS = 1.0
"""Of sweeps that say something about a machine."""
LEAST_BUSY = 0.5
"""Part of them in which a resource works that says something about itself."""


@dataclass(slots=True)
class Foresight:
    """Predicted seconds, added up sweep by sweep as they really were."""

    cost: SweepCost
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)

    def add(self, spans: Sequence[RowSpan]) -> None:
        """One sweep more."""
        terms = self.cost.terms(load_of(spans))
        self.seconds += terms.seconds
        for name, seconds in terms.busy.items():
            self.busy[name] = self.busy.get(name, 0.0) + seconds

    def report(self, measured: Mapping[str, float], seconds: float) -> dict[str, Any]:
        """Predicted and measured seconds: of all sweeps, and those in which each resource works."""
        names = [n for n, each in self.busy.items() if each or measured.get(n)]
        rows = {n: _pair(self.busy[n], measured.get(n, 0.0)) for n in names}
        return {"seconds": _pair(self.seconds, seconds), "terms": rows}

    def lesson(
        self, measured: Mapping[str, float], seconds: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        """What `PlanningSpeeds.learn` is told, predicted and measured; nothing of a short run.

        Of resources that worked for most of it: one that often waits for others is slower than it
        could be.
        """
        if seconds < LEAST_SECONDS:
            return {}, {}
        busy = {name for name, each in measured.items() if each >= LEAST_BUSY * seconds}
        return {n: each for n, each in self.busy.items() if n in busy}, dict(measured)


def _pair(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": round(predicted, 3), "measured": round(measured, 3)}


def load_of(spans: Sequence[RowSpan]) -> SweepLoad:
    """What rides in a sweep of `spans`. A guess takes a row like a prompt's."""
    rows = generating = read = positions = stored = 0
    for span in spans:
        rows += span.length
        each = span.length * (2 * span.start + span.length + 1) // 2
        positions += each
        if span.length == 1 and span.wants_logits:
            generating += 1
            read += each
        else:
            stored += span.start
    return SweepLoad(rows, generating, read, positions, stored)
