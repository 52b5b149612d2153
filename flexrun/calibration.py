"""What is measured before the first sweep, and what the scheduler does with it."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from offload.links import Link
from offload.tiers import Tier
from policy_search.cost_model import (
    free_rows,
    swapping_is_cheaper,
    weight_seconds,
)
from policy_search.hardware import Hardware
from policy_search.operators import expansion_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flexrun.scheduler import BatchScheduler
    from offload.backend import DeviceBackend
    from offload.slabs import Weight
    from offload.weights import WeightStore
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy
    from policy_search.sweep_cost import SweepCost

_MOST_VALUES = 1 << 24
"""Of the matrix that is multiplied with."""
_MOST_EXPANDED = 32 << 20
"""Bytes that are expanded: more than caches hold on most machines."""
_ROWS = {"cpu": 256}
_MANY_ROWS = 2048
_REPEATS = 5
_REMEMBERED = 5
"""Sweeps that say how long rows and weights take; few, so that the first are soon forgotten."""


def measured_flops(
    backend: DeviceBackend, dtype: torch.dtype, hidden_size: int, widest: int, workspace: int
) -> float:
    """Operations per second of products of many rows with a matrix as a layer's widest one.

    The median of a few, after one that is not counted. They fit into what is left of the device's
    budget and into the `workspace`, bytes that are charged for sweeps and not in use yet.
    """
    columns = max(1, min(widest, _MOST_VALUES // hidden_size))
    rows = _ROWS.get(backend.device.type, _MANY_ROWS)
    room = backend.account.available(Tier.DEVICE)
    most = math.inf if room is None else (room + workspace) // dtype.itemsize
    while (rows + columns) * hidden_size + rows * columns > most and max(rows, columns) > 1:
        rows, columns = max(1, rows // 2), max(1, columns // 2)
    matrix = torch.ones(columns, hidden_size, dtype=dtype, device=backend.device)
    values = torch.ones(rows, hidden_size, dtype=dtype, device=backend.device)
    seconds = _median_seconds(backend, lambda: torch.nn.functional.linear(values, matrix))
    return 2 * rows * columns * hidden_size / seconds


def _median_seconds(backend: DeviceBackend, compute: Callable[[], object]) -> float:
    """Of a few calls, after one that is not counted."""
    seconds = []
    for _ in range(_REPEATS + 1):
        backend.synchronize(backend.record())
        start = time.perf_counter()
        compute()
        backend.synchronize(backend.record())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measured_expansion(backend: DeviceBackend, weight: Weight, workspace: int) -> float:
    """Bytes per second, as they are computed with, at which rows like those of `weight` expand.

    `workspace`: see `measured_flops`.
    """
    columns, dtype = weight.row_shape[-1], weight.compute_dtype or weight.dtype
    rows = weight.shape.numel() // columns
    stored, expanded = weight.nbytes // rows, columns * dtype.itemsize
    room = backend.account.available(Tier.DEVICE)
    most = _MOST_EXPANDED if room is None else min(_MOST_EXPANDED, room + workspace)
    rows = max(1, min(rows, most // (stored + expanded)))
    data = torch.zeros(rows * stored, dtype=torch.uint8, device=backend.device)
    out = torch.empty(rows, columns, dtype=dtype, device=backend.device)
    seconds = _median_seconds(backend, lambda: weight.fill(out, data))
    return rows * expanded / seconds


def measured_hardware(
    backend: DeviceBackend,
    dtype: torch.dtype,
    shape: ModelShape,
    weights: Mapping[Link, float],
    swap: Mapping[Link, float],
    workspace: int,
    expanded: Weight | None = None,
) -> Hardware:
    """The device's compute, the links' speeds for `weights`, and the one for pages that `swap`.

    `workspace`: see `measured_flops`; `expanded`: a weight that stands for those that are.
    """
    return Hardware(
        host_to_device=weights.get(Link.HOST_TO_DEVICE, math.inf),
        disk_read=weights.get(backend.disk_in, math.inf),
        swap=min(swap.values(), default=math.inf),
        expansion=math.inf
        if expanded is None
        else measured_expansion(backend, expanded, workspace),
        flops=measured_flops(backend, dtype, shape.hidden_size, shape.widest, workspace),
    )


class _Busy(NamedTuple):
    """Seconds up to the end of a sweep: see `RowBudget.learn`."""

    computed: float
    arriving: tuple[float, ...]
    alone: tuple[float, ...]


class _Sweep(NamedTuple):
    """Seconds of one row, and of the link that took longest: as it was, and by itself."""

    of_one: float
    arriving: float
    alone: float


def _longest(now: tuple[float, ...], then: tuple[float, ...]) -> float:
    links = zip(now, then or (0.0,) * len(now))
    return max((after - before for after, before in links), default=0.0)


class RowBudget:
    """The rows of a sweep that are free: as planned at first, then as measured."""

    def __init__(
        self,
        scheduler: BatchScheduler,
        seconds: float,
        planned: float,
        *,
        prompts: bool,
        guess: bool,
        expansion: float = 0.0,
    ) -> None:
        """A sweep's weights take `seconds`, in which `planned` rows should compute.

        A part of what the device computes is `expansion`, seconds of every sweep. `prompts` take no
        more than these rows unless places would stay empty, and `guess`ed tokens fill them.
        """
        self._scheduler = scheduler
        self._seconds = seconds
        self._prompts = prompts
        self._guess = guess
        self._expansion = expansion
        self._guessed = 0
        """Rows that are free in sweeps with guesses."""
        self._before = _Busy(0.0, (), ())
        self._last: deque[_Sweep] = deque(maxlen=_REMEMBERED)
        """That had about as many rows."""
        self._set(int(planned), int(planned))

    def learn(
        self,
        rows: int,
        computed: float,
        arriving: Sequence[float],
        alone: Sequence[float],
        expanded: float = 1.0,
    ) -> None:
        """A sweep of `rows` is over.

        Seconds of all sweeps so far: `computed` by the device; `arriving`, in which each of the
        links was busy that weights come over; `alone`, what its bytes would take if nothing else
        ran. A disk that reads while the processor computes is slower than one by itself. Of what is
        expanded in a full sweep, a part was `expanded`. The head's few rows are often multiplied
        with it packed; where layers are, too, the rows were few and say nothing about many.
        """
        busy = _Busy(computed, tuple(arriving), tuple(alone))
        before, self._before = self._before, busy
        seconds = computed - before.computed - expanded * self._expansion
        bound = self.rows if self._prompts else self._guessed
        enough = rows >= min(bound, self._scheduler.max_rows) // 2
        if seconds > 0 and enough and expanded > 0.5:
            longest = (_longest(busy.arriving, before.arriving), _longest(busy.alone, before.alone))
            self._last.append(_Sweep(seconds / rows, *longest))
        if len(self._last) == _REMEMBERED:
            of_one, arrived, own = (statistics.median(each) for each in zip(*self._last))
            arrived = arrived or self._seconds
            free = [each - self._expansion for each in (arrived, min(arrived, own or arrived))]
            self._set(*(int(each / of_one) for each in free))

    def _set(self, rows: int, guessed: int) -> None:
        """`guessed` is for sweeps with guesses: what slows the weights down is not free for them.

        Prompts have to be computed at some time, and slow them down whenever it is.
        """
        self.rows, self._guessed = max(1, rows), max(1, guessed)
        self._scheduler.free_rows = self.rows if self._prompts else None
        self._scheduler.speculation.most_rows = self._guessed if self._guess else 0


def tune(
    scheduler: BatchScheduler,
    policy: Policy,
    shape: ModelShape,
    hardware: Hardware,
    store: WeightStore,
    cost: SweepCost | None,
    *,
    prompts: bool,
) -> RowBudget | None:
    """Where pages go that have to go away, and the rows that are free, if weights are streamed.

    `prompts` take no more rows than these, unless places would stay empty. How long rows compute is
    known from the plan's `cost`, or told from products of many rows.
    """
    if policy.preemption == "swap":
        scheduler.preemption.swapping_is_cheaper = lambda _: True
    elif policy.preemption == "auto":
        scheduler.preemption.swapping_is_cheaper = partial(swapping_is_cheaper, shape, hardware)
    if not store.streamed_bytes:
        return None
    seconds = weight_seconds(store.streamed_bytes, store.disk_bytes, hardware)
    planned = free_rows(shape, hardware, seconds) if cost is None else cost.rows_within(seconds)
    guess = policy.speculation != "off"
    expansion = expansion_seconds(shape, hardware)
    return RowBudget(scheduler, seconds, planned, prompts=prompts, guess=guess, expansion=expansion)
