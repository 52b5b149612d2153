"""Facts about the order of a sweep's steps."""

from __future__ import annotations

import itertools
from collections import Counter

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
    """One layer, one micro-batch: layer and head are asked for, and each step comes once."""
    assert list(zigzag(1, 1, depth=1)) == [
        Step(Action.PREFETCH, 0),
        Step(Action.PREFETCH, 1),
        Step(Action.START, micro_batch=0),
        Step(Action.PARK, 0, 0),
        Step(Action.BIND, 0),
        Step(Action.FETCH_KV, 0, 0),
        Step(Action.FETCH, 0, 0),
        Step(Action.COMPUTE, 0, 0),
        Step(Action.STORE_KV, 0, 0),
        Step(Action.PARK, 1, 0),
        Step(Action.RELEASE, 0),
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
    """When a unit computes, exactly the layers `depth - 1` ahead and the head are asked for."""
    held: set[int] = set()
    for step in zigzag(layers, batches, depth):
        if step.action is Action.PREFETCH:
            held.add(step.unit)
            assert len(held - {layers}) <= depth
        elif step.action is Action.RELEASE:
            held.remove(step.unit)
        elif step.action is Action.COMPUTE:
            ahead = range(step.unit, min(step.unit + depth, layers))
            assert held == {*ahead, layers}
    assert held == set()


@every_size
def test_the_head_is_asked_for_before_anything_computes(layers, batches, depth):
    """The head has working memory of its own, so it may travel during the whole sweep."""
    for warm, last in itertools.product((False, True), repeat=2):
        steps = list(zigzag(layers, batches, depth, warm=warm, last=last))
        start = next(i for i, step in enumerate(steps) if step.action is Action.START)
        assert Step(Action.PREFETCH, layers) in steps[:start]


def test_two_sweeps_overlap():
    """Two layers and two slots: where one has ended, the next sweep's travels meanwhile."""
    first = list(zigzag(2, 1, depth=2, last=False))
    second = list(zigzag(2, 1, depth=2, warm=True))

    def weights(steps: list[Step]) -> list[tuple[str, int]]:
        wanted = (Action.PREFETCH, Action.BIND, Action.RELEASE)
        return [(step.action.value, step.unit) for step in steps if step.action in wanted]

    assert weights(first) == [
        *(("prefetch", unit) for unit in (0, 1, 2)),
        ("bind", 0),
        ("release", 0),
        ("prefetch", 0),
        ("bind", 1),
        ("release", 1),
        ("prefetch", 1),
        ("bind", 2),
        ("release", 2),
    ]
    uses = [(what, unit) for unit in range(3) for what in ("bind", "release")]
    assert weights(second) == [("prefetch", 2), *uses]


LASTS = [
    lasts for length in (1, 2, 3, 4) for lasts in itertools.product((False, True), repeat=length)
]
"""Of several sweeps one after another, which are known to be the last."""


def sweeps(layers: int, batches: int, depth: int, lasts: tuple[bool, ...]) -> list[list[Step]]:
    """A sweep after one that is not known to be the last is warm."""
    warms = (False, *(not last for last in lasts[:-1]))
    return [
        list(zigzag(layers, batches, depth, warm=warm, last=last))
        for warm, last in zip(warms, lasts)
    ]


@every_size
def test_over_several_sweeps_a_unit_is_asked_for_once_a_sweep(layers, batches, depth):
    """Every bind has one prefetch of its own, since the last release; none is left after the end.

    A last sweep that is not known to be one has asked for the first layers for nothing.
    """
    for lasts in LASTS:
        asked: set[int] = set()
        prefetches = Counter[int]()
        for step in itertools.chain(*sweeps(layers, batches, depth, lasts)):
            if step.action is Action.PREFETCH:
                assert step.unit not in asked
                asked.add(step.unit)
                prefetches[step.unit] += 1
            elif step.action is Action.BIND:
                assert step.unit in asked
            elif step.action is Action.RELEASE:
                asked.remove(step.unit)
        ahead = set() if lasts[-1] else set(range(min(depth, layers)))
        assert asked == ahead
        assert prefetches == {unit: len(lasts) + (unit in ahead) for unit in range(layers + 1)}


@every_size
def test_over_several_sweeps_the_ring_is_large_enough(layers, batches, depth):
    """No more than `depth` layers besides the head are held at a time, across sweeps too."""
    for lasts in LASTS:
        held: set[int] = set()
        for step in itertools.chain(*sweeps(layers, batches, depth, lasts)):
            if step.action is Action.PREFETCH:
                held.add(step.unit)
                assert len(held - {layers}) <= depth
            elif step.action is Action.RELEASE:
                held.remove(step.unit)


@every_size
def test_over_several_sweeps_prefetch_is_never_idle(layers, batches, depth):
    """When a unit computes, the next `depth` layers are here or on their way, the head besides.

    So no slot stays empty around the end of a sweep.
    """
    for lasts in LASTS:
        held: set[int] = set()
        for number, steps in enumerate(sweeps(layers, batches, depth, lasts)):
            for step in steps:
                if step.action is Action.PREFETCH:
                    held.add(step.unit)
                elif step.action is Action.RELEASE:
                    held.remove(step.unit)
                elif step.action is Action.COMPUTE:
                    end = layers if lasts[number] else 2 * layers
                    soon = range(step.unit, min(step.unit + depth, end, step.unit + layers))
                    assert held == {*(unit % layers for unit in soon), layers}


@every_size
def test_only_weights_travel_across_the_end_of_a_sweep(layers, batches, depth):
    """A warm sweep, or one that others follow, computes and moves KV like any other."""

    def without_prefetch(**kind: bool) -> list[Step]:
        steps = zigzag(layers, batches, depth, **kind)
        return [step for step in steps if step.action is not Action.PREFETCH]

    plain = without_prefetch()
    for warm, last in itertools.product((False, True), repeat=2):
        assert without_prefetch(warm=warm, last=last) == plain


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


@every_size
def test_activations_wait_between_all_units(layers, batches, depth):
    """A micro-batch parks after its start and after each layer, and is back before the next."""
    for breaks in (False, True):
        steps = list(zigzag(layers, batches, depth, breaks=breaks, across=depth > 1))
        park, fetch = places(steps, Action.PARK), places(steps, Action.FETCH)
        compute, finish = places(steps, Action.COMPUTE), places(steps, Action.FINISH)
        units = [(unit, batch) for unit in range(layers + 1) for batch in range(batches)]
        assert sorted(park) == units
        assert sorted(fetch) == [pair for pair in units if pair[0] < layers]
        for unit, batch in fetch:
            assert fetch[unit, batch] < compute[unit, batch]
            assert park[unit, batch] < fetch[unit, batch] or batches == 1
            assert (finish if breaks else compute)[unit, batch] < park[unit + 1, batch]
        for pair in units:
            assert park[pair] < compute[pair]


@every_size
def test_layers_that_break_off(layers, batches, depth):
    """Each is finished once the next one or two have broken off, while its weights are bound."""
    for across in (False, True) if depth > 1 else (False,):
        steps = list(zigzag(layers, batches, depth, breaks=True, across=across))
        compute, finish = places(steps, Action.COMPUTE), places(steps, Action.FINISH)
        bind, release = places(steps, Action.BIND), places(steps, Action.RELEASE)
        pairs = [(layer, batch) for layer in range(layers) for batch in range(batches)]
        assert sorted(finish) == pairs
        assert sorted(finish, key=finish.__getitem__) == pairs
        for number, (unit, batch) in enumerate(pairs):
            assert bind[unit, -1] < compute[unit, batch] < finish[unit, batch] < release[unit, -1]
            for ahead in pairs[number + 1 :]:
                near = number + min(2 if depth > 2 else 1, batches - 1) >= pairs.index(ahead)
                overlaps = near and (across or ahead[0] == unit)
                assert (compute[ahead] < finish[unit, batch]) == overlaps
        alive: set[int] = set()
        for step in steps:
            if step.action is Action.COMPUTE and step.unit < layers:
                alive.add(step.micro_batch)
                assert len(alive) <= (3 if depth > 2 else 2)
            elif step.action is Action.FINISH:
                alive.remove(step.micro_batch)
        assert alive == set()


@every_size
def test_breaks_move_the_same_bytes(layers, batches, depth):
    """The ring of weights is as large, and every unit and page travels as often, as without."""
    travels = (Action.PREFETCH, Action.BIND, Action.RELEASE, Action.FETCH_KV, Action.STORE_KV)
    plain = Counter(s for s in zigzag(layers, batches, depth) if s.action in travels)
    for across in (False, True) if depth > 1 else (False,):
        steps = list(zigzag(layers, batches, depth, breaks=True, across=across))
        assert Counter(s for s in steps if s.action in travels) == plain
        held: set[int] = set()
        for step in steps:
            if step.action is Action.PREFETCH:
                assert step.unit not in held
                held.add(step.unit)
                assert len(held - {layers}) <= depth
            elif step.action is Action.BIND:
                assert step.unit in held
            elif step.action is Action.RELEASE:
                held.remove(step.unit)
        fetch, store = places(steps, Action.FETCH_KV), places(steps, Action.STORE_KV)
        pairs = sorted(fetch)
        for number, pair in enumerate(pairs[2:]):
            assert store[pairs[number]] < fetch[pair], "a third buffer would be needed"
