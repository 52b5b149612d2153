"""The highest rate of requests that still meets its targets, by bisection (no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SHARE = 0.9
"""Of the requests that have to meet both targets (DistServe's goodput, OSDI 2024)."""
LOWEST, HIGHEST = 1 / 64, 2.0**20
"""Requests per second, between which the rate is looked for."""
_FIRST = 1.0
"""The rate that is tried first: far below, requests come one by one, which takes long to run."""
_PRECISION = 0.01


def highest_rate(attainment: Callable[[float], float]) -> float:
    """Requests per second at which `attainment(rate)` is at least `SHARE`; 0 if it never is.

    From `_FIRST` half as many until they are few enough, or twice as many until these are too many,
    then halfway between, to one part in a hundred (DistServe's and Vidur's search). Looser targets
    never give a lower rate: where the searches part, the one that goes on above has passed what the
    other one failed.
    """
    low = _FIRST
    while attainment(low) < SHARE:
        low /= 2
        if low < LOWEST:
            return 0.0
    while low < HIGHEST and attainment(2 * low) >= SHARE:
        low *= 2
    high = 2 * low
    while high - low > _PRECISION * low and low < HIGHEST:
        middle = (low + high) / 2
        if attainment(middle) >= SHARE:
            low = middle
        else:
            high = middle
    return low
