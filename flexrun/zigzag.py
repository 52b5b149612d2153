"""The zig-zag order of a sweep as data: layer outside, micro-batch inside (no torch).

The executor, its step-by-step twin and the tests all interpret this one stream of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

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
    """Send a micro-batch's KV pages of one layer and its activations to the device."""
    COMPUTE = "compute"
    """Run one unit of one micro-batch."""
    STORE_KV = "store_kv"
    """Send the new keys and values to the tier of their pages, activations to where they wait."""
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
) -> Iterator[Step]:
    """Steps of one sweep over `layers` decoder layers and the output head, which is unit `layers`.

    Weights of layers are asked for `depth - 1` units ahead, across the end of a sweep unless it is
    the `last`; a sweep that follows one is `warm`: its first layers are on their way already. The
    head, which has working memory of its own, is asked for at once and travels when nothing more
    urgent does. KV pages, and activations that wait on HOST, are asked for one micro-batch ahead.
    So all of it travels while earlier micro-batches compute. Each unit is prefetched, bound and
    released once, however many micro-batches ride.
    """
    units = layers + 1
    depth = min(depth, units)
    for unit in () if warm else range(min(depth - 1, layers)):
        yield Step(Action.PREFETCH, unit)
    yield Step(Action.PREFETCH, layers)
    for batch in range(micro_batches):
        yield Step(Action.START, micro_batch=batch)
    # The walk over (unit, micro-batch) flattened: the neighbour after the last micro-batch of one
    # layer is the first of the next, so no corner needs a case of its own.
    walk = [(unit, batch) for unit in range(units) for batch in range(micro_batches)]
    for here, ahead in zip(walk, [*walk[1:], None]):
        unit, batch = here
        if batch == 0:
            wanted = unit + depth - 1
            if wanted < layers or (wanted > layers and not last):
                yield Step(Action.PREFETCH, wanted % units)
            yield Step(Action.BIND, unit)
        if here == walk[0]:
            yield Step(Action.FETCH_KV, *here)
        if ahead is not None and ahead[0] < layers:
            yield Step(Action.FETCH_KV, *ahead)
        yield Step(Action.COMPUTE, unit, batch)
        if unit < layers:
            yield Step(Action.STORE_KV, unit, batch)
        if batch == micro_batches - 1:
            yield Step(Action.RELEASE, unit)
