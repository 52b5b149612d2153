"""Facts about the executor: it interprets the zig-zag steps, with parts that only take notes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from flexrun.executor import Executor
from flexrun.plan import MicroBatch, RowSpan, SweepPlan
from flexrun.zigzag import Action, zigzag

LAYERS, VOCAB = 3, 50


@dataclass
class Notes:
    """What happened, in order."""

    events: list[tuple[Any, ...]] = field(default_factory=list)
    inputs: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)


class FakeTransfer:
    def __init__(self, notes: Notes, name: tuple[Any, ...]) -> None:
        self.notes, self.name = notes, name

    def synchronize(self) -> None:
        self.notes.events.append(("arrived", *self.name))


class FakeForward:
    """A forward pass that attends once per layer; row i's logits favour token 10 * i."""

    def __init__(self, notes: Notes, attend: Any, logit_rows: torch.Tensor, number: int) -> None:
        self.notes, self.attend, self.rows, self.number = notes, attend, logit_rows, number
        self.unit = -1

    def resume(self) -> Any:
        if self.unit >= 0:
            self.notes.events.append((Action.COMPUTE, self.unit, self.number))
        if 0 <= self.unit < LAYERS:
            self.attend("module", "query", "key", "value", "options")
        self.unit += 1
        if self.unit <= LAYERS:
            return None
        logits = torch.zeros(1, len(self.rows), VOCAB)
        logits[0, torch.arange(len(self.rows)), self.rows * 10] = 1
        return type("Output", (), {"logits": logits})


class FakeModel:
    layers = range(LAYERS)

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def forward(self, attend: Any, ids: Any, positions: Any, rows: torch.Tensor) -> FakeForward:
        number = len(self.notes.inputs)
        self.notes.events.append((Action.START, -1, number))
        self.notes.inputs.append((ids.tolist(), positions.tolist(), rows.tolist()))
        return FakeForward(self.notes, attend, rows, number)


class FakeParts:
    """Weights, KV cache and attention in one."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def prefetch(self, unit: int) -> list[Any]:
        self.notes.events.append((Action.PREFETCH, unit, -1))
        return [FakeTransfer(self.notes, ("weights", unit))]

    def bind(self, unit: int) -> None:
        self.notes.events.append((Action.BIND, unit, -1))

    def release(self, unit: int) -> None:
        self.notes.events.append((Action.RELEASE, unit, -1))

    def begin(self, spans: Any) -> None:
        self.notes.events.append(("begin", [len(batch) for batch in spans]))

    def fetch(self, layer: int, number: int) -> Any:
        self.notes.events.append((Action.FETCH_KV, layer, number))
        return FakeTransfer(self.notes, ("kv in", layer, number)) if number else None

    def store(self, layer: int, number: int) -> Any:
        self.notes.events.append((Action.STORE_KV, layer, number))
        return FakeTransfer(self.notes, ("kv out", layer, number))

    def append(self, layer: int, number: int, key: Any, value: Any) -> None:
        self.notes.events.append(("append", layer, number))

    def view(self, layer: int, number: int) -> Any:
        return (layer, number)

    def run(self, query: Any, key: Any, value: Any, groups: Any, options: Any) -> None:
        self.notes.events.append(("attend", *groups))


PLAN = SweepPlan(
    (
        MicroBatch((RowSpan(4, 0, 3, True), RowSpan(7, 2, 2, False))),
        MicroBatch((RowSpan(9, 5, 1, True), RowSpan(2, 1, 2, True))),
        MicroBatch((RowSpan(5, 0, 2, False),)),
    )
)
TOKENS = {sequence: [100 * sequence + i for i in range(9)] for sequence in (2, 4, 5, 7, 9)}


def run(*, overlap: bool = True) -> tuple[dict[int, int], Notes]:
    notes = Notes()
    parts: Any = FakeParts(notes)
    model: Any = FakeModel(notes)
    executor = Executor(
        model, parts, parts, parts, device=torch.device("cpu"), overlap=overlap, depth=2
    )
    return executor.run(PLAN, TOKENS, lambda numbers, logits: logits.argmax(-1)), notes


def test_the_steps_are_the_zigzag():
    """The executor does what the zig-zag says, in its order, and attends in every layer."""
    _, notes = run()
    assert notes.events[0] == ("begin", [2, 2, 1])
    steps = [event for event in notes.events if isinstance(event[0], Action)]
    assert steps == [(s.action, s.unit, s.micro_batch) for s in zigzag(LAYERS, 3, 2)]
    for place, event in enumerate(notes.events):
        if event[0] is Action.COMPUTE and event[1] < LAYERS:
            assert notes.events[place + 1] == ("append", *event[1:])
            assert notes.events[place + 2] == ("attend", *event[1:])


def test_rows_are_packed():
    """A micro-batch is its spans' tokens and positions one after another."""
    _, notes = run()
    assert notes.inputs == [
        ([400, 401, 402, 702, 703], [0, 1, 2, 2, 3], [2]),
        ([905, 201, 202], [5, 1, 2], [0, 2]),
        ([500, 501], [0, 1], [1]),
    ]


def test_sequences_that_want_a_token_get_theirs():
    """Each chosen token goes to the sequence whose last row it came from, and to no other."""
    chosen, _ = run()
    assert chosen == {4: 20, 9: 0, 2: 20}


def test_without_overlap_transfers_are_over_at_once():
    """The step-by-step twin waits for every transfer right after the step that submitted it."""
    chosen, notes = run(overlap=False)
    assert chosen == run(overlap=True)[0]
    names = {Action.PREFETCH: "weights", Action.FETCH_KV: "kv in", Action.STORE_KV: "kv out"}
    for place, event in enumerate(notes.events):
        if event[0] in names and (event[0], event[2]) != (Action.FETCH_KV, 0):
            where = event[1:2] if event[0] is Action.PREFETCH else event[1:]
            assert notes.events[place + 1] == ("arrived", names[event[0]], *where)


def test_with_overlap_nothing_is_waited_for():
    """The overlapping executor never blocks on a transfer it has just submitted."""
    _, notes = run(overlap=True)
    assert [event for event in notes.events if event[0] == "arrived"] == []


def test_a_sweep_of_chunks_chooses_nothing():
    """If no row is a sequence's last, no token is chosen, but the head still runs."""
    notes = Notes()
    parts: Any = FakeParts(notes)
    model: Any = FakeModel(notes)
    executor = Executor(model, parts, parts, parts, device=torch.device("cpu"))
    plan = SweepPlan((MicroBatch((RowSpan(4, 0, 3, False),)),))
    assert executor.run(plan, TOKENS, lambda *_: pytest.fail("nothing to choose")) == {}
    assert (Action.COMPUTE, LAYERS, 0) in notes.events
