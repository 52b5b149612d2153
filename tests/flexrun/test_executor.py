"""Facts about the executor: it interprets the zig-zag steps, with parts that only take notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from flexrun.executor import Executor
from flexrun.plan import MicroBatch, RowSpan, SweepPlan
from flexrun.zigzag import Action, Step, zigzag
from offload.backend_cpu import CpuBackend
from offload.tiers import MemoryAccount
from offload.timeline import COMPUTE, SAMPLING, Timeline

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

    def wait(self) -> None:
        self.notes.events.append(("ordered after", *self.name))


class FakeTensor:
    dtype = "dtype"
    sinks = "sinks"


class FakeForward:
    """A forward pass that attends once per layer; row i's logits favour token 10 * i."""

    def __init__(self, notes: Notes, attend: Any, logit_rows: torch.Tensor, number: int) -> None:
        self.notes, self.attend, self.rows, self.number = notes, attend, logit_rows, number
        self.unit = -1
        self.hidden: Any = None

    def resume(self) -> Any:
        if self.unit >= 0:
            self.notes.events.append((Action.COMPUTE, self.unit, self.number))
        if 0 <= self.unit < LAYERS:
            query, options = FakeTensor(), FakeTensor()
            self.attend("module", query, "key", "value", options)
        self.unit += 1
        if self.unit <= LAYERS:
            self.hidden = ("hidden", self.unit, self.number)
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


class FakeState:
    """Nothing was attended to."""

    def finish(self, sinks: Any, dtype: Any) -> None:
        assert (sinks, dtype) == ("sinks", "dtype")


class FakeParts:
    """Weights, KV cache and attention in one."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def prefetch(self, unit: int) -> list[Any]:
        self.notes.events.append((Action.PREFETCH, unit, -1))
        return [FakeTransfer(self.notes, ("weights", unit))]

    def arrive(self, unit: int) -> None:
        self.notes.events.append(("weights are here", unit))

    def bind(self, unit: int, rows: Sequence[int]) -> None:
        self.notes.events.append((Action.BIND, unit, -1))

    def release(self, unit: int) -> None:
        self.notes.events.append((Action.RELEASE, unit, -1))

    def begin(self, spans: Any) -> None:
        self.notes.events.append(("begin", [len(batch) for batch in spans]))

    def groups(self, number: int) -> Any:
        return ["group", number]

    def prepare(self, groups: Any) -> None:
        self.notes.events.append(("prepare", *groups))

    def fetch(self, layer: int, number: int) -> Any:
        self.notes.events.append((Action.FETCH_KV, layer, number))
        return [FakeTransfer(self.notes, ("kv in", layer, number))] if number else []

    def store(self, layer: int, number: int) -> Any:
        self.notes.events.append((Action.STORE_KV, layer, number))
        return [FakeTransfer(self.notes, ("kv out", layer, number))]

    def append(self, layer: int, number: int, key: Any, value: Any) -> None:
        self.notes.events.append(("append", layer, number))

    def view(self, layer: int, number: int) -> Any:
        return (layer, number)

    def centres(self, layer: int, number: int) -> None:
        return None

    def parts(self, query: Any, key: Any, value: Any, groups: Any, *options: Any) -> FakeState:
        self.notes.events.append(("attend", *groups))
        return FakeState()

    def arriving(self, layer: int, number: int) -> Any:
        """Only the second micro-batch's pages are still on their way when it attends."""
        return [FakeTransfer(self.notes, ("kv in", layer, number))] if number == 1 else []


class FakeActivations:
    """Hidden states that leave and come back."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def begin(self, rows: list[int]) -> None:
        self.notes.events.append(("activations begin", rows))

    def store(self, number: int, hidden: Any) -> Any:
        self.notes.events.append(("activations out", number, hidden))
        return FakeTransfer(self.notes, ("activations out", number))

    def fetch(self, number: int) -> Any:
        self.notes.events.append(("activations in", number))
        return FakeTransfer(self.notes, ("activations in", number))

    def arrive(self, number: int) -> None:
        self.notes.events.append(("activations are here", number))

    def end(self) -> None:
        self.notes.events.append(("activations end",))


PLAN = SweepPlan(
    (
        MicroBatch((RowSpan(4, 0, 3, True), RowSpan(7, 2, 2, False))),
        MicroBatch((RowSpan(9, 5, 1, True), RowSpan(2, 1, 2, True))),
        MicroBatch((RowSpan(5, 0, 2, False),)),
    )
)
TOKENS = {sequence: [100 * sequence + i for i in range(9)] for sequence in (2, 4, 5, 7, 9)}


def make_executor(notes: Notes, *, overlap: bool = True) -> tuple[Executor, Timeline]:
    parts: Any = FakeParts(notes)
    model: Any = FakeModel(notes)
    activations: Any = FakeActivations(notes)
    backend = CpuBackend(MemoryAccount())
    timeline = Timeline(backend, traced=True)
    executor = Executor(
        model, parts, parts, parts, backend, timeline, activations, overlap=overlap, depth=2
    )
    return executor, timeline


def greedy(numbers: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def run(*, overlap: bool = True) -> tuple[dict[int, list[int]], Notes]:
    notes = Notes()
    executor, _ = make_executor(notes, overlap=overlap)
    return executor.run(PLAN, TOKENS, greedy), notes


def test_the_steps_are_the_zigzag():
    """The executor does what the zig-zag says, in its order, and attends in every layer."""
    _, notes = run()
    prepared = [("prepare", "group", number) for number in range(3)]
    begin = [("begin", [2, 2, 1]), *prepared, ("activations begin", [5, 3, 2])]
    assert notes.events[:5] == begin
    assert notes.events[-1] == ("activations end",)
    steps = [event for event in notes.events if isinstance(event[0], Action)]
    assert steps == steps_of(zigzag(LAYERS, 3, 2, last=False))
    for place, event in enumerate(notes.events):
        if event[0] is Action.COMPUTE and event[1] < LAYERS:
            # Pages that are still on their way are waited for where they are needed.
            expected = [("ordered after", "kv in", *event[1:])] if event[2] == 1 else []
            expected += [("append", *event[1:]), ("attend", *event[1:])]
            assert notes.events[place + 1 :][: len(expected)] == expected


def steps_of(steps: Iterable[Step]) -> list[tuple[Action, int, int]]:
    """Those that take a note as such: what activations do has notes of its own."""
    activations = (Action.PARK, Action.FETCH)
    return [(s.action, s.unit, s.micro_batch) for s in steps if s.action not in activations]


def test_weights_are_waited_for_before_they_are_bound():
    """A unit is bound right after its weights arrived, and each is waited for once a sweep."""
    _, notes = run()
    arrivals = [i for i, event in enumerate(notes.events) if event[0] == "weights are here"]
    assert [notes.events[i][1] for i in arrivals] == list(range(LAYERS + 1))
    for place in arrivals:
        unit = notes.events[place][1]
        assert notes.events[place + 1] == (Action.BIND, unit, -1)


def test_hidden_states_leave_after_a_unit_and_are_back_before_the_next():
    """Between layers a micro-batch's hidden states go to HOST, and what computes waits for them.

    What the head takes stays: it is a few rows only.
    """
    _, notes = run()
    for number in range(3):
        mine: list[tuple[Any, ...]] = []
        for event in notes.events:
            if event[0] in ("activations out", "activations in", "activations are here"):
                mine += [event] if event[1] == number else []
            elif event[0] is Action.COMPUTE and event[2] == number:
                mine.append(event)
        expected: list[tuple[Any, ...]] = []
        for unit in range(LAYERS):
            expected += [
                ("activations out", number, ("hidden", unit, number)),
                ("activations in", number),
                ("activations are here", number),
                (Action.COMPUTE, unit, number),
            ]
        expected += [("activations are here", number), (Action.COMPUTE, LAYERS, number)]
        assert mine == expected


def test_a_sweep_that_breaks_off_lets_go_of_activations():
    """After an error in a unit, no micro-batch and no hidden state is kept."""
    notes = Notes()
    executor, _ = make_executor(notes)

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        executor.run(PLAN, TOKENS, broken)
    assert notes.events[-1] == ("activations end",)
    assert executor._micro_batches == []


def test_a_sweep_goes_on_where_the_one_before_looked_ahead():
    """Unless a plan is the last, the next sweep's first layers are asked for at its end."""
    notes = Notes()
    executor, _ = make_executor(notes)
    expected = []
    # After a last sweep, another one may follow: a library's user asks again.
    kinds = [(False, False), (True, False), (True, True), (False, True), (False, False)]
    for warm, last in kinds:
        notes.inputs.clear()  # micro-batches are numbered by it
        chosen = executor.run(SweepPlan(PLAN.micro_batches, last=last), TOKENS, greedy)
        assert chosen == {4: [20], 9: [0], 2: [20]}
        expected += steps_of(zigzag(LAYERS, 3, 2, warm=warm, last=last))
    assert [event for event in notes.events if isinstance(event[0], Action)] == expected


def test_the_timeline_knows_what_was_computed():
    """Each unit of each micro-batch, each start, binding and choice is an interval of its own.

    A wait for KV pages in the middle of attention cuts a layer in two and is no compute.
    """
    executor, timeline = make_executor(Notes())
    executor.run(PLAN, TOKENS, greedy)
    rows = [(interval.row, interval.name) for interval in timeline.finish()]
    units = [(unit, batch) for unit in range(LAYERS + 1) for batch in range(3)]
    cut_in_two = [(unit, 1) for unit in range(LAYERS)]
    assert sorted(rows) == sorted(
        [(COMPUTE, f"unit {unit}, micro-batch {batch}") for unit, batch in [*units, *cut_in_two]]
        + [(COMPUTE, f"start of micro-batch {batch}") for batch in range(3)]
        + [(COMPUTE, "weights")] * (LAYERS + 1)
        + [(SAMPLING, "sampling")] * 3
    )


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
    assert chosen == {4: [20], 9: [0], 2: [20]}


def test_without_overlap_transfers_are_over_at_once():
    """The step-by-step twin waits for every transfer right after the step that submitted it."""
    chosen, notes = run(overlap=False)
    assert chosen == run(overlap=True)[0]
    names = {Action.PREFETCH: "weights", Action.FETCH_KV: "kv in", Action.STORE_KV: "kv out"}
    steps: list[tuple[Action, list[Any], list[Any]]] = []
    for event in notes.events:
        if isinstance(event[0], Action):
            steps.append((event[0], [], []))
        if event[0] in names:
            kind, where = names[event[0]], event[1:2] if event[2] < 0 else event[1:]
            if (event[0], event[2]) != (Action.FETCH_KV, 0):  # it had no pages to fetch
                steps[-1][1].append((kind, *where))
        elif event[0] in ("activations in", "activations out"):
            steps[-1][1].append((event[0], event[1]))
        elif event[0] == "arrived":
            steps[-1][2].append(event[1:])
    assert all(submitted == arrived for _, submitted, arrived in steps)
    assert sum(len(arrived) for _, _, arrived in steps) > 20


def test_with_overlap_nothing_is_waited_for():
    """The overlapping executor never blocks on a transfer it has just submitted."""
    _, notes = run(overlap=True)
    assert [event for event in notes.events if event[0] == "arrived"] == []


def test_a_sweep_of_chunks_chooses_nothing():
    """If no row is a sequence's last, no token is chosen, but the head still runs."""
    notes = Notes()
    executor, _ = make_executor(notes)
    plan = SweepPlan((MicroBatch((RowSpan(4, 0, 3, False),)),))
    assert executor.run(plan, TOKENS, lambda *_: pytest.fail("nothing to choose")) == {}
    assert (Action.COMPUTE, LAYERS, 0) in notes.events
