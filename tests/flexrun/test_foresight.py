"""The cost model's seconds of sweeps that ran, held against what they took."""

from __future__ import annotations

from typing import Any

import pytest

import flexrun.foresight
from flexrun.foresight import Foresight, load_of
from flexrun.plan import RowSpan
from flexrun.report import report_text
from policy_search.sweep_load import SweepLoad, SweepTerms

SECONDS = 5.0


class Stated:
    """A cost of a second a row on the link, and half of that on the device."""

    def terms(self, load: SweepLoad) -> SweepTerms:
        return SweepTerms(1.5 * load.rows, {"host->device": load.rows, "compute": load.rows / 2})


def foresight(sweeps: int = 4) -> Foresight:
    cost: Any = Stated()
    found = Foresight(cost)
    for _ in range(sweeps):
        found.add([RowSpan(0, 7, 1, True), RowSpan(1, 0, 2, False)])
    return found


def test_a_sweep_in_numbers() -> None:
    """A newest token after 9 others, a chunk of 3 after 4, and a whole prompt."""
    spans = [RowSpan(0, 9, 1, True), RowSpan(1, 4, 3, False), RowSpan(2, 0, 2, True)]
    assert load_of(spans) == SweepLoad(6, 1, 10, 10 + (5 + 6 + 7) + (1 + 2), 4)


def test_the_report_has_both() -> None:
    """Seconds of sweeps and of each resource, and what no sweep was told of is left out."""
    report = foresight().report({"host->device": 24.0, "disk->host": 1.0}, 36.0)
    assert report == {
        "seconds": {"predicted": 18.0, "measured": 36.0},
        "terms": {
            "host->device": {"predicted": 12.0, "measured": 24.0},
            "compute": {"predicted": 6.0, "measured": 0.0},
        },
    }
    links: dict[str, Any] = {}
    summary = {"bound": "compute", "compute_share": 0.0, "links": links, "predicted": report}
    assert "  host->device        12.00      24.00 (+100%)" in report_text(summary)


@pytest.fixture(autouse=True)
def _seconds_that_teach(monkeypatch) -> None:
    """Tests of jobs teach nothing: see conftest.py."""
    monkeypatch.setattr(flexrun.foresight, "LEAST_SECONDS", SECONDS)


def test_what_is_learned() -> None:
    """Seconds of what worked most of the time."""
    predicted, measured = foresight().lesson({"host->device": 24.0, "compute": 6.0}, 36.0)
    assert predicted == {"host->device": 12.0}
    assert measured["host->device"] == 24.0


@pytest.mark.parametrize(("busy", "seconds"), [({"compute": 1.0}, SECONDS / 2), ({}, 2 * SECONDS)])
def test_a_short_run_teaches_nothing(busy: dict[str, float], seconds: float) -> None:
    """Nor one in which nothing was measured."""
    predicted, _ = foresight().lesson(busy, seconds)
    assert predicted == {}
