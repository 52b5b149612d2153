"""When requests arrive, and how long they are: what is simulated (no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from policy_search.workload import Lengths


class TimedRequest(NamedTuple):
    """One request on the virtual clock."""

    arrival: float
    """Seconds."""
    prompt: int
    """Tokens, at least one, and …"""
    output: int
    """… tokens that it generates, at least one."""
    name: str = ""
    """As the trace calls it; empty: its number."""
    application: str = "0"


def at_once(lengths: Sequence[Lengths]) -> list[TimedRequest]:
    """A job: all requests are there from the beginning."""
    return [TimedRequest(0.0, *each) for each in lengths]


def poisson(lengths: Sequence[Lengths], rate: float, seed: int) -> list[TimedRequest]:
    """`rate` requests per second, independent of each other.

    With the same seed, another rate stretches the same arrivals.
    """
    import numpy as np

    gaps = np.random.default_rng([seed, len(lengths)]).exponential(size=len(lengths))
    times = (gaps.cumsum() / rate).tolist()
    return [TimedRequest(time, *each) for time, each in zip(times, lengths)]
