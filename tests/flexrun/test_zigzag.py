"""Facts about the order of a sweep's steps."""

from __future__ import annotations

import itertools

import pytest

from flexrun.zigzag import Action, Step, zigzag

SIZES = [
    (layers, batches, depth)
    for layers in (1, 2, 5)
    for batches in (1, 2, 4)
    for depth in (1, 2, 3, 9)
]
every_size = pytest.mark.parametrize(("layers", "batches", "depth"), SIZES)


def places(steps: list[Step], action: Action) -> dict[tuple[int, int], int]:
    """Where in the stream each (unit, micro-batch) of an action stands."""
    found = [(s.unit, s.micro_batch) for s in steps if s.action is action]
    assert len(found) == len(set(found)), f"{action} comes twice"
    return {(s.unit, s.micro_batch): place for place, s in enumerate(steps) if s.action is action}


def test_the_smallest_sweep():
    """One layer, one micro-batch, no look-ahead: weights, KV, layer, KV, then the head."""
    assert list(zigzag(1, 1, depth=1)) == [
        Step(Action.START, micro_batch=0),
        Step(Action.PREFETCH, 0),
        Step(Action.BIND, 0),
        Step(Action.FETCH_KV, 0, 0),
        Step(Action.COMPUTE, 0, 0),
        Step(Action.STORE_KV, 0, 0),
        Step(Action.RELEASE, 0),
        Step(Action.PREFETCH, 1),
        Step(Action.BIND, 1),
        Step(Action.COMPUTE, 1, 0),
        Step(Action.RELEASE, 1),
    ]


@every_size
def test_layer_outside_micro_batch_inside(layers, batches, depth):
    """Units are computed in order, and within a unit the micro-batches."""
    steps = list(zigzag(layers, batches, depth))
    computed = [(s.unit, s.micro_batch) for s in steps if s.action is Action.COMPUTE]
    assert computed == [(unit, batch) for unit in range(layers + 1) for batch in range(batches)]


@every_size
def test_every_micro_batch_starts_before_the_first_layer(layers, batches, depth):
    """Forward passes are started once each, before anything is computed."""
    steps = list(zigzag(layers, batches, depth))
    starts = places(steps, Action.START)
    assert sorted(starts) == [(-1, batch) for batch in range(batches)]
    assert max(starts.values()) < min(places(steps, Action.COMPUTE).values())


@every_size
def test_weights_travel_once_per_sweep(layers, batches, depth):
    """A unit is prefetched, bound and released once, however many micro-batches ride."""
    steps = list(zigzag(layers, batches, depth))
    prefetch, bind = places(steps, Action.PREFETCH), places(steps, Action.BIND)
    release, compute = places(steps, Action.RELEASE), places(steps, Action.COMPUTE)
    units = [(unit, -1) for unit in range(layers + 1)]
    assert sorted(prefetch) == sorted(bind) == sorted(release) == units
    for unit in range(layers + 1):
        uses = [compute[unit, batch] for batch in range(batches)]
        assert prefetch[unit, -1] < bind[unit, -1] < min(uses)
        assert max(uses) < release[unit, -1]


@every_size
def test_prefetch_looks_ahead_as_far_as_the_ring(layers, batches, depth):
    """When a unit computes, the next `depth - 1` units are asked for, and never more."""
    held: set[int] = set()
    for step in zigzag(layers, batches, depth):
        if step.action is Action.PREFETCH:
            held.add(step.unit)
            assert len(held) <= depth
        elif step.action is Action.RELEASE:
            held.remove(step.unit)
        elif step.action is Action.COMPUTE:
            last = min(step.unit + depth, layers + 1)
            assert held == set(range(step.unit, last))


@every_size
def test_kv_is_fetched_one_ahead_and_stored_after(layers, batches, depth):
    """Every layer's KV is fetched and stored once per micro-batch, in at most two buffers."""
    steps = list(zigzag(layers, batches, depth))
    fetch, store = places(steps, Action.FETCH_KV), places(steps, Action.STORE_KV)
    compute = places(steps, Action.COMPUTE)
    pairs = [(layer, batch) for layer in range(layers) for batch in range(batches)]
    assert sorted(fetch) == sorted(store) == pairs
    for here, ahead in itertools.pairwise(pairs):
        assert fetch[here] < fetch[ahead] < compute[here], "the next one's pages travel meanwhile"
    for number, pair in enumerate(pairs):
        assert fetch[pair] < compute[pair] < store[pair]
        if number >= 2:
            assert store[pairs[number - 2]] < fetch[pair], "a third buffer would be needed"
