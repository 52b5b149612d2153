"""The zig-zag order of a sweep as data: layer outside, micro-batch inside (no torch).

The executor, its step-by-step twin and the tests all interpret this one stream of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from offload.tiers import BROKEN_OFF

if TYPE_CHECKING:
    from collections.abc import Iterator


class Action(Enum):
    """What a step does."""

    START = "start"
    """Run a micro-batch's forward pass up to its first layer."""
    PREFETCH = "prefetch"
    """Send a unit's streamed weights on their way."""
    BIND = "bind"
    """Wait for a unit's weights and make them the model's parameters."""
    FETCH_KV = "fetch_kv"
    """Send a micro-batch's KV pages of one layer to the device."""
    FETCH = "fetch"
    """Bring the activations of a micro-batch that waits for a unit back to the device."""
    COMPUTE = "compute"
    """Run one unit of one micro-batch; with a break, only up to what the host attends to."""
    STORE_KV = "store_kv"
    """Send the new keys and values to the tier of their pages."""
    FINISH = "finish"
    """Run the rest of a layer, once the host has attended."""
    PARK = "park"
    """The micro-batch waits for a unit: its activations may leave the device."""
    RELEASE = "release"
    """The unit's working memory may be overwritten."""


@dataclass(frozen=True, slots=True)
class Step:
    """One action on a unit (a layer, or the output head after the last layer) and micro-batch."""

    action: Action
    unit: int = -1
    micro_batch: int = -1


def zigzag(
    layers: int,
    micro_batches: int,
    depth: int = 2,
    *,
    warm: bool = False,
    last: bool = True,
    breaks: bool = False,
    across: bool = True,
) -> Iterator[Step]:
    """Steps of one sweep over `layers` decoder layers and the output head, which is unit `layers`.

    Weights of `depth` layers are in working memory or on their way to it: where one has ended, the
    layer `depth` further on is asked for, across the end of a sweep unless it is the `last`; a
    sweep that follows one is `warm`: its first layers are on their way already. The head, which
    has working memory of its own, is asked for at once and travels when nothing more urgent does,
    and layers travel while it computes. KV pages, and activations that wait on HOST, are asked for
    one micro-batch ahead. So all of it travels while earlier micro-batches compute. Each unit is
    prefetched, bound and released once, however many micro-batches ride.

    With `breaks`, the host attends to a part of the pages: a layer of one micro-batch breaks off
    there, and goes on when the next one or two have got as far (`BROKEN_OFF`). These may be in the
    next layer if `across`, as long as both layers' weights have room; else breaks end before it.
    """
    return _Sweep(layers, micro_batches, depth, warm, last, breaks, across).steps()


@dataclass(frozen=True, slots=True)
class _Sweep:
    layers: int
    micro_batches: int
    depth: int
    warm: bool
    last: bool
    breaks: bool
    across: bool

    def steps(self) -> Iterator[Step]:
        yield from self._start()
        # The walk over (unit, micro-batch) flattened: the neighbour after the last micro-batch of
        # one layer is the first of the next, so no corner needs a case of its own.
        count = self.micro_batches
        walk = [(unit, batch) for unit in range(self.layers + 1) for batch in range(count)]
        begun: list[tuple[int, int]] = []
        for here, ahead in zip(walk, [*walk[1:], (self.layers + 1, 0)]):
            unit, batch = here
            if batch == 0:
                while begun and not self.across:
                    yield from self._finish(*begun.pop(0))
                yield Step(Action.BIND, unit)
            if here == walk[0]:
                yield Step(Action.FETCH_KV, *here)
                yield Step(Action.FETCH, *here)
            yield from self._compute(here, ahead, begun)

    def _start(self) -> Iterator[Step]:
        for unit in () if self.warm else range(self._slots):
            yield Step(Action.PREFETCH, unit)
        yield Step(Action.PREFETCH, self.layers)
        for batch in range(self.micro_batches):
            yield Step(Action.START, micro_batch=batch)
            yield Step(Action.PARK, 0, batch)

    def _compute(
        self, here: tuple[int, int], ahead: tuple[int, int], begun: list[tuple[int, int]]
    ) -> Iterator[Step]:
        layer, more = here[0] < self.layers, ahead[0] < self.layers
        if more:
            yield Step(Action.FETCH_KV, *ahead)
        if more and not self.breaks:
            yield Step(Action.FETCH, *ahead)
        yield Step(Action.COMPUTE, *here)
        if layer:
            yield Step(Action.STORE_KV, *here)
        begun.append(here)
        # Fewer than all: each has finished a layer before it begins the next one. And with two
        # slots for weights, a layer that is finished later asks later for the next but one.
        most = BROKEN_OFF if self.depth > 2 else 1
        waiting = min(most, self.micro_batches - 1) if self.breaks and layer else 0
        while len(begun) > waiting:
            yield from self._finish(*begun.pop(0))
        if more and self.breaks:
            yield Step(Action.FETCH, *ahead)

    def _finish(self, unit: int, batch: int) -> Iterator[Step]:
        if unit < self.layers:
            if self.breaks:
                yield Step(Action.FINISH, unit, batch)
            yield Step(Action.PARK, unit + 1, batch)
        if batch == self.micro_batches - 1:
            yield Step(Action.RELEASE, unit)
            wanted = unit + self._slots
            if unit < self.layers and (wanted < self.layers or not self.last):
                yield Step(Action.PREFETCH, wanted % self.layers)

    @property
    def _slots(self) -> int:
        return min(self.depth, self.layers)
