"""The executor: interprets the zig-zag steps of one sweep."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flexrun.attention.centres import Centres
from flexrun.row_counts import rounded
from flexrun.zigzag import Action, zigzag
from offload.timeline import COMPUTE, SAMPLING, Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from flexrun.attention.interface import AttentionBackend
    from flexrun.host_attention import HostAttention
    from flexrun.model import Model
    from flexrun.paused_forward import AttentionOptions, PausedForward
    from flexrun.plan import MicroBatch, SweepPlan
    from offload.activations import ActivationStore
    from offload.backend import DeviceBackend
    from offload.embedding import EmbeddingTable
    from offload.kv_cache import KVCache
    from offload.transfer import Transfer
    from offload.weights import WeightStore


@dataclass(slots=True)
class _Running:
    """One micro-batch of the sweep."""

    batch: MicroBatch
    input_ids: torch.Tensor
    """[rows], or more: copies of the last one make up a round number."""
    positions: torch.Tensor
    """Of the same rows."""
    logit_rows: torch.Tensor
    """Rows that the head gets; copies of the last one here, too."""
    forward: PausedForward | None = None
    logits: Any = None


class Executor:
    """Runs sweeps: resumes paused forward passes in zig-zag order while bytes travel.

    Micro-batches of up to `filled_rows` rows are filled up to a round number. While the host
    attends, two layers may be in use at a time, if the weights of `two_bound` have room.
    """

    def __init__(
        self,
        model: Model,
        weights: WeightStore,
        kv_cache: KVCache,
        attention: AttentionBackend,
        backend: DeviceBackend,
        timeline: Timeline,
        activations: ActivationStore,
        *,
        embedding: EmbeddingTable | None = None,
        overlap: bool = True,
        depth: int = 2,
        filled_rows: int = 0,
        host_attention: HostAttention | None = None,
        two_bound: bool = True,
    ) -> None:
        self._model = model
        self._weights = weights
        self._kv = kv_cache
        self._attention = attention
        self._backend = backend
        self._timeline = timeline
        self._embedding = embedding
        self._activations = activations
        self._device = backend.device
        self._overlap = overlap
        self._depth = depth
        self._filled_rows = filled_rows
        self._host_attention = host_attention
        self._across = two_bound and depth > 1
        self._breaks = False
        """In this sweep, HOST attends to some of the pages."""
        self._micro_batches: list[_Running] = []
        self._since: tuple[Any, str, str] = (None, "", "")
        """When what is timed now began, its row and its name."""
        self._warm = False
        """The last sweep sent this one's first weights on their way."""

    def run(
        self,
        plan: SweepPlan,
        tokens: Mapping[int, Sequence[int]],
        choose: Callable[[list[int], torch.Tensor], torch.Tensor],
    ) -> dict[int, list[int]]:
        """Compute `plan`; the next token of every sequence whose rows end in one.

        `tokens` holds each sequence's token ids, guessed ones at their end; `choose(sequences,
        logits [n, vocab])` picks the next ids [n] on the device. A sequence with guessed tokens has
        several rows there, one after the other, and gets what each of them chooses.
        """
        self._begin(plan, tokens)
        chosen: list[tuple[list[int], torch.Tensor]] = []
        head, count = len(self._model.layers), len(self._micro_batches)
        try:
            ring = {"warm": self._warm, "last": plan.last, "across": self._across}
            for step in zigzag(head, count, self._depth, breaks=self._breaks, **ring):
                self._do(step.action, step.unit, step.micro_batch)
                if step.action is Action.COMPUTE and step.unit == head:
                    chosen.extend(self._choose(self._micro_batches[step.micro_batch], choose))
            self._warm = not plan.last
        finally:
            self._micro_batches = []  # paused forward passes hold activations
            self._activations.end()
        if not chosen:
            return {}
        # One copy, and the only wait for the device, at the very end of the sweep.
        ids = torch.cat([ids for _, ids in chosen]).tolist()
        found: dict[int, list[int]] = defaultdict(list)
        for sequence, token in zip([s for sequences, _ in chosen for s in sequences], ids):
            found[sequence].append(token)
        return found

    def _do(self, action: Action, unit: int, number: int) -> None:
        match action:
            case Action.PREFETCH:
                self._settle(self._weights.prefetch(unit))
            case Action.BIND:
                self._bind(unit)
            case Action.RELEASE:
                self._weights.release(unit)
            case Action.START:
                self._start(number)
            case Action.FETCH_KV:
                self._settle(self._kv.fetch(unit, number))
            case Action.FETCH:
                self._settle([self._activations.fetch(number)])
            case Action.COMPUTE | Action.FINISH:
                self._compute(action, unit, number)
            case Action.STORE_KV:
                self._settle(self._kv.store(unit, number))
            case Action.PARK:
                self._settle([self._park(unit, number)])

    def _bind(self, unit: int) -> None:
        self._weights.arrive(unit)
        with self._timed(COMPUTE, "weights"):
            self._weights.bind(unit, self._rows_of(unit))

    def _rows_of(self, unit: int) -> list[int]:
        if unit == len(self._model.layers):
            return [len(running.logit_rows) for running in self._micro_batches]
        return [len(running.input_ids) for running in self._micro_batches]

    def _compute(self, action: Action, unit: int, number: int) -> None:
        running = self._micro_batches[number]
        assert running.forward is not None
        if action is Action.COMPUTE:
            self._activations.arrive(number)
        what = "rest of unit" if action is Action.FINISH else "unit"
        with self._timed(COMPUTE, f"{what} {unit}, micro-batch {number}"):
            running.logits = running.forward.resume()

    def _park(self, unit: int, number: int) -> Transfer | None:
        """The micro-batch waits for its turn in `unit`: its hidden states may leave the device."""
        forward = self._micro_batches[number].forward
        assert forward is not None
        hidden, forward.hidden = forward.hidden, None
        if hidden is None or unit == len(self._model.layers):
            return None  # the head takes just the rows that need logits
        return self._activations.store(number, hidden)

    @contextlib.contextmanager
    def _timed(self, row: str, name: str) -> Iterator[None]:
        self._since = self._backend.mark(), row, name
        yield
        self._stop_clock()

    def _stop_clock(self) -> None:
        start, row, name = self._since
        self._timeline.add_marks(row, name, start, self._backend.mark())

    def _wait(self, transfers: Sequence[Transfer]) -> None:
        """In the middle of compute, wait for bytes without counting it as compute."""
        self._stop_clock()
        for transfer in transfers:
            transfer.wait()
        self._since = self._backend.mark(), *self._since[1:]

    def _settle(self, transfers: Sequence[Transfer | None]) -> None:
        """Without overlap every transfer is over before the next step begins."""
        if not self._overlap:
            for transfer in transfers:
                if transfer is not None:
                    transfer.synchronize()

    def _begin(self, plan: SweepPlan, tokens: Mapping[int, Sequence[int]]) -> None:
        """Bring what the forward passes of a sweep start from to the device, all at once."""
        spans = [span for batch in plan.micro_batches for span in batch.spans]
        ids = torch.tensor([t for s in spans for t in tokens[s.sequence][s.start : s.end]])
        if self._embedding is not None:
            ids = self._embedding.bind(ids, self._model.embedding)
        positions = torch.cat([torch.arange(s.start, s.end) for s in spans])
        rows = [batch.rows for batch in plan.micro_batches]
        inputs = [
            *map(self._filled, ids.split(rows)),
            *map(self._filled, positions.split(rows)),
            *(self._filled(_logit_rows(batch)) for batch in plan.micro_batches),
        ]
        # It waits for the device: the sweep before is over, also if it chose no token.
        sent = torch.cat(inputs).to(self._device).split([len(each) for each in inputs])
        count = len(rows)
        self._micro_batches = [
            _Running(batch, *sent[number::count]) for number, batch in enumerate(plan.micro_batches)
        ]
        self._kv.begin([batch.spans for batch in plan.micro_batches])
        for number in range(count):
            self._attention.prepare(self._kv.groups(number))
        self._breaks = self._host_attention is not None and self._kv.any_hosted
        self._activations.begin([len(running.input_ids) for running in self._micro_batches])

    def _filled(self, rows: torch.Tensor) -> torch.Tensor:
        """Of a round number, if the model wants that: the last one again and again."""
        more = min(rounded(len(rows)), self._filled_rows) - len(rows)
        return torch.cat([rows, rows[-1:].expand(more)]) if more > 0 else rows

    def _start(self, number: int) -> None:
        running = self._micro_batches[number]
        running.forward = self._model.forward(
            lambda *call: self._attend(number, *call),
            running.input_ids,
            running.positions,
            running.logit_rows,
        )
        with self._timed(COMPUTE, f"start of micro-batch {number}"):
            running.forward.resume()

    def _attend(
        self,
        number: int,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        running = self._micro_batches[number]
        forward = running.forward
        assert forward is not None
        if arriving := self._kv.arriving(forward.unit, number):
            self._wait(arriving)
        rows = running.batch.rows
        if more := len(running.input_ids) - rows:
            query, key, value = query[:, :rows], key[:, :rows], value[:, :rows]
        host = self._host_attention if self._breaks else None
        call = forward.unit, number, query, key, value, options
        sent = None if host is None else host.send(*call)
        self._kv.append(forward.unit, number, key, value)
        groups = self._kv.view(forward.unit, number)
        packed = self._kv.centres(forward.unit, number)
        centres = None if packed is None else Centres(*packed)
        state = self._attention.parts(query, key, value, groups, options, centres)
        if host is not None:
            forward.pause()
        if host is not None and sent is not None:
            self._wait(host.waits_for(sent))
            there, part, lse = host.receive(sent)
            if centres is not None:
                part, lse = centres.undone(query, there, part, lse, options)
            state.add(there, part, lse)
        out = state.finish(options.sinks, query.dtype)
        return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, more)) if more else out

    def _choose(
        self, running: _Running, choose: Callable[[list[int], torch.Tensor], torch.Tensor]
    ) -> list[tuple[list[int], torch.Tensor]]:
        spans = (span for span in running.batch.spans if span.wants_logits)
        sequences = [span.sequence for span in spans for _ in range(1 + span.drafts)]
        logits, running.logits, running.forward = running.logits.logits[0], None, None
        with self._timed(SAMPLING, "sampling"):
            chosen = choose(sequences, logits[: len(sequences)]) if sequences else None
        return [] if chosen is None else [(sequences, chosen)]


def _logit_rows(batch: MicroBatch) -> torch.Tensor:
    wanted: list[int] = []
    end = 0
    for span in batch.spans:
        end += span.length
        if span.wants_logits:
            wanted += range(end - 1 - span.drafts, end)
    # The head always gets a row, so that its weights are used as planned.
    return torch.tensor(wanted or [batch.spans[0].length - 1])
