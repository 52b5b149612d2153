"""How long requests had to wait, and how many had to wait too long (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from policy_search.arrivals import TimedRequest
    from policy_search.request_times import RequestTimes

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Targets:
    """What a request may take at most, in seconds."""

    ttft: float = math.inf
    """From its arrival to its first token (time to first token), …"""
    tpot: float = math.inf
    """… and from token to token after that, on average (time per output token)."""

    def met_by(self, latencies: Latencies) -> float:
        """The share of requests that take no longer; 1 if there are none."""
        if not len(latencies.ttft):
            return 1.0
        slow = latencies.tpot > self.tpot  # False where there is one token: NaN
        return float(((latencies.ttft <= self.ttft) & ~slow).mean())


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds of every request."""

    queue: np.ndarray
    """Until a machine begins with its prompt."""
    ttft: np.ndarray
    """Until its first token."""
    tpot: np.ndarray
    """Between two tokens, on average; NaN where there is only one."""
    e2e: np.ndarray
    """Until its last token."""

    @classmethod
    def of(cls, requests: Sequence[TimedRequest], times: RequestTimes) -> Latencies:
        """When all have finished."""
        import numpy as np

        count = len(requests)
        arrival = np.fromiter((request.arrival for request in requests), float, count)
        gaps = np.fromiter((request.output - 1 for request in requests), float, count)
        first, finished = np.asarray(times.first), np.asarray(times.finished)
        gaps[gaps == 0] = np.nan
        return cls(
            queue=np.asarray(times.begun) - arrival,
            ttft=first - arrival,
            tpot=(finished - first) / gaps,
            e2e=finished - arrival,
        )

    def percentiles(self) -> dict[str, dict[str, float]]:
        """Mean and `PERCENTILES` of TTFT, TPOT and end-to-end times, of the requests that have
        them.
        """
        named = {"queue": self.queue, "ttft": self.ttft, "tpot": self.tpot, "e2e": self.e2e}
        return {name: _statistics(values) for name, values in named.items()}


def _statistics(values: np.ndarray) -> dict[str, float]:
    import numpy as np

    known = values[~np.isnan(values)]
    if not len(known):
        return {}
    points = np.percentile(known, PERCENTILES).tolist()
    named = {f"p{percent}": value for percent, value in zip(PERCENTILES, points)}
    return {"mean": float(known.mean()), **named}
