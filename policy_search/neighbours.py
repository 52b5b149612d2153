"""Plans beside a good one: all sizes of a batch at once, each with as many weights on the device as
fit then (no torch).

The linear program has no whole tensors, and is asked for one size of the batch after another. Here
plans are priced only, which takes a tenth of the time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from offload.errors import CapacityError
from offload.tiers import Split
from policy_search.memory import workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from policy_search.job_pricing import Candidate
    from policy_search.policy import Policy
    from policy_search.search import Search

MICRO_BATCHES = (64, 128, 256, 512, 1024, 2048)
SWEEPS = (256, 512, 1024, 2048, 4096, 8192)
"""Rows."""
WORTH_ANOTHER = 0.01
"""Round: so much faster."""
PROMISING = 0.95
"""Of the rate: fewer rows leave room for a little more weights."""
STEP = 0.5
"""Percent of the weights."""
SCANNED = 5
"""Steps."""
FILLED = 4
"""Sizes of a batch."""


def try_neighbours(search: Search, start: Candidate) -> None:
    """Add them to `search`: other micro-batches and sweeps, and of the best of these other numbers
    of sequences, as long as that finds what is faster.
    """
    while True:
        best = start
        resized = [_resized(search, start.policy, batch) for batch in _sizes(search, start)]
        fitting = [each for each in resized if not isinstance(each, CapacityError)]
        fitting.sort(key=lambda each: (-_rate(each), workspace(search.shape, each.policy)))
        for each in fitting[:FILLED]:
            best = _faster(best, filled(search, each.policy))
        for count in search.near(best.policy.max_sequences):
            batch = search.with_rows(replace(best.policy, max_sequences=count))
            best = _faster(best, filled(search, batch))
        best = _scanned(search, best)
        if not _rate(best) > (1 + WORTH_ANOTHER) * _rate(start):
            return
        start = best


def _scanned(search: Search, best: Candidate) -> Candidate:
    """The best of shares on DEVICE that are a little less or more: with whole tensors the largest
    layer that is streamed, of which there are several buffers, may be smaller with any.
    """
    split = best.policy.weights
    if "weights" in search.given or split.device == 100:
        return best
    for steps in range(-SCANNED, SCANNED + 1):
        weights = _with_device(split, split.device + steps * STEP)
        best = _faster(best, search.add(replace(best.policy, weights=weights)))
    return best


def _rate(candidate: Candidate) -> float:
    return candidate.prediction.tokens_per_second


def _faster(best: Candidate, other: Candidate | CapacityError) -> Candidate:
    return best if isinstance(other, CapacityError) else max(best, other, key=_rate)


def _resized(search: Search, policy: Policy, batch: Policy) -> Candidate | CapacityError:
    """`batch` with as many weights on DEVICE as `policy` if its rows take more, or less, of it."""
    split, shape = policy.weights, search.shape
    if "weights" in search.given or split.device == 100:
        return search.add(batch)
    freed = workspace(shape, policy) - workspace(shape, batch)
    more = 100 * freed / (shape.weight_bytes - shape.resident_bytes)
    return search.add(replace(batch, weights=_with_device(split, split.device + more)))


def _with_device(split: Split, device: float) -> Split:
    """About so many percent; the slowest tier that is used has as much less or more."""
    device = min(100.0, max(0.0, math.floor(device / STEP) * STEP))
    left = 100 - device
    host = min(split.host, left) if split.disk else left
    return Split(device=device, host=host, disk=left - host)


def _sizes(search: Search, start: Candidate) -> Iterator[Policy]:
    """Others of what is not given, unless they would be slower even with as much memory."""
    policy, rate = start.policy, start.prediction.tokens_per_second
    here = policy.micro_batch_rows, policy.max_rows
    batches = [here[0]] if "micro_batch_rows" in search.given else sorted({*MICRO_BATCHES, here[0]})
    sweeps = [here[1]] if "max_rows" in search.given else sorted({*SWEEPS, here[1]})
    for rows in batches:
        for most in sweeps:
            changed = replace(policy, micro_batch_rows=rows, max_rows=most)
            if rows > most or search.with_rows(changed) != changed:
                continue
            if search.predicted(changed, start.memory).tokens_per_second >= PROMISING * rate:
                yield changed


def filled(search: Search, policy: Policy) -> Candidate | CapacityError:
    """`policy` with the most weights on DEVICE beside pages for all sequences, then with the most
    on HOST if there are some on DISK.
    """
    best = search.add(policy)
    if "weights" in search.given or policy.weights.device == 100:
        return best
    last = "disk" if policy.weights.disk or search.unified else "host"

    def priced(device: float, host: float = 0.0) -> Candidate | CapacityError:
        parts = {"device": device, "host": host}
        parts[last] = 100 - device - (host if last == "disk" else 0.0)
        return search.add(replace(policy, weights=Split(**parts)))

    # What fits is where to begin: less on DEVICE may be too much for HOST.
    here = policy.weights.device if search.has_room(best) else 0.0
    device, found = _most(search, priced, here, 100.0)
    if last == "disk" and not search.unified:
        _, found = _most(search, partial(priced, device), 0.0, 100 - device)
    return found if isinstance(best, CapacityError) else _faster(best, found)


def _most(
    search: Search,
    priced: Callable[[float], Candidate | CapacityError],
    start: float,
    limit: float,
) -> tuple[float, Candidate | CapacityError]:
    """The largest percentage under `limit` with room for all pages, and the plan; by bisection from
    `start` on, which is taken to have room.
    """
    least, most = math.floor(start / STEP), int(limit / STEP)
    best = priced(least * STEP)
    while least + 1 < most:
        middle = (least + most) // 2
        found = priced(middle * STEP)
        if search.has_room(found):
            least, best = middle, found
        else:
            most = middle
    return least * STEP, best
