"""Weights that are stored in another form than products want: expanded, or multiplied packed.

A matrix is expanded once a sweep for all micro-batches, and then read in 16 or 32 bits by each;
multiplied packed it is read in its few bits by each. So for few micro-batches of few rows it stays
packed, if this device has been found to be faster then.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compression.product_gpu import MOST_ROWS, can_multiply, works
from offload.copy_stream import new_event
from offload.packed_matrix import PackedMatrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from compression.spec import GroupFormat
    from offload.slabs import Weight

logger = logging.getLogger(__name__)

MEASURED_ROWS = (16, MOST_ROWS)
"""Fewer rows than the next of these take about as long as it."""
_REPEATS = 5


class _Kind(NamedTuple):
    """Matrices that take the same time."""

    shape: torch.Size
    spec: GroupFormat | None
    dtype: torch.dtype


class _Product(NamedTuple):
    """Milliseconds of one product of so many rows."""

    packed: float
    expanded: float


class Expansion:
    """Room for one unit's weights in the type that is computed in."""

    def __init__(self, room: torch.Tensor, products: frozenset[str]) -> None:
        """`room`: uint8 [sum of expanded bytes]; `products`: names of weights that only their own
        `torch.nn.Linear` uses.
        """
        self._room = room
        self._products = products
        self._expanding: dict[_Kind, float] = {}
        """Milliseconds of expanding one."""
        self._times: dict[tuple[_Kind, int], _Product] = {}
        """By `MEASURED_ROWS`."""
        self.expanded_bytes = 0
        """That were filled, in all sweeps together."""

    def bind(self, weights: Iterable[tuple[Weight, torch.Tensor]], rows: Sequence[int]) -> None:
        """Make weights, of which the bytes have arrived, what micro-batches of `rows` use.

        The bytes of those that stay packed are read until the last of these has computed.
        """
        for (weight, data), room in self._places(weights):
            if self.stays_packed(weight, rows):
                weight.bind(PackedMatrix(weight, data, room))
            else:
                weight.bind(weight.expand(data, room))
                self.expanded_bytes += weight.expanded_bytes

    def _places(
        self, weights: Iterable[tuple[Weight, torch.Tensor]]
    ) -> Iterable[tuple[tuple[Weight, torch.Tensor], torch.Tensor]]:
        start = 0
        for weight, data in weights:
            end = start + weight.expanded_bytes
            yield (weight, data), self._room[start:end]
            start = end

    def can_stay_packed(self, weight: Weight) -> bool:
        """Whether there is a product with `weight` as it is stored."""
        if weight.spec is None or len(weight.shape) != 2 or weight.name not in self._products:
            return False
        return can_multiply(weight.spec, weight.shape[1])

    def stays_packed(self, weight: Weight, rows: Sequence[int]) -> bool:
        """Whether all products of micro-batches of `rows` are faster than expanding, too."""
        kind = _kind(weight)
        if kind not in self._expanding or not rows or max(rows) > MOST_ROWS:
            return False
        if not self.can_stay_packed(weight):
            return False
        nearest = (next(most for most in MEASURED_ROWS if each <= most) for each in rows)
        packed, expanded = (sum(each) for each in zip(*(self._times[kind, m] for m in nearest)))
        return packed < self._expanding[kind] + expanded

    def measure(self, weights: Iterable[tuple[Weight, torch.Tensor]], most_rows: int) -> None:
        """Time what can stay packed of a unit on a GPU both ways, for up to `most_rows` rows.

        One after the other, as in a sweep: what is read has not just been used. Bytes may be any.
        """
        places = [
            place
            for place in self._places(weights)
            if self.can_stay_packed(place[0][0]) and self._works(*place[0])
        ]
        if all(_kind(weight) in self._expanding for (weight, _), _ in places):
            return
        kinds = [_kind(weight) for (weight, _), _ in places]
        expand = [partial(weight.expand, data, room) for (weight, data), room in places]
        self._expanding |= zip(kinds, _milliseconds(expand))
        shape = min(MOST_ROWS, most_rows), max(kind.shape[1] for kind in kinds)
        x = torch.zeros(shape, dtype=kinds[0].dtype, device=self._room.device)
        for most in MEASURED_ROWS:
            matrices = [weight.expand(data, room) for (weight, data), room in places]
            expanded = _milliseconds([partial(_multiply, x[:most], each) for each in matrices])
            matrices = [PackedMatrix(weight, data, room) for (weight, data), room in places]
            packed = _milliseconds([partial(_multiply, x[:most], each) for each in matrices])
            for kind, *both in zip(kinds, packed, expanded):
                self._times[kind, most] = _Product(*both)
                logger.info("%s, %d rows: %.3f ms packed, %.3f expanded", kind, most, *both)

    def _works(self, weight: Weight, data: torch.Tensor) -> bool:
        assert weight.spec is not None
        return works(weight.spec, weight.compute_dtype or weight.dtype, data.device)


def _kind(weight: Weight) -> _Kind:
    return _Kind(weight.shape, weight.spec, weight.compute_dtype or weight.dtype)


def _multiply(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x[:, : matrix.shape[1]].to(matrix.dtype), matrix)


def _milliseconds(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Of each of `calls`, one after the other: medians of a few turns, after one that compiles."""
    turns = []
    for _ in range(_REPEATS + 1):
        events = [new_event() for _ in range(len(calls) + 1)]
        events[0].record()
        for call, event in zip(calls, events[1:]):
            call()
            event.record()
        events[-1].synchronize()
        turns.append([before.elapsed_time(after) for before, after in itertools.pairwise(events)])
    return [statistics.median(each) for each in zip(*turns[1:])]
