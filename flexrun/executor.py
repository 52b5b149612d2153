"""The executor: interprets the zig-zag steps of one sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flexrun.zigzag import Action, zigzag

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flexrun.attention.interface import AttentionBackend
    from flexrun.model import Model
    from flexrun.paused_forward import AttentionOptions, PausedForward
    from flexrun.plan import MicroBatch, SweepPlan
    from offload.embedding import EmbeddingTable
    from offload.kv_cache import KVCache
    from offload.transfer import Transfer
    from offload.weights import WeightStore


@dataclass(slots=True)
class _Running:
    """One micro-batch of the sweep."""

    batch: MicroBatch
    forward: PausedForward | None = None
    logits: Any = None


class Executor:
    """Runs sweeps: resumes paused forward passes in zig-zag order while bytes travel."""

    def __init__(
        self,
        model: Model,
        weights: WeightStore,
        kv_cache: KVCache,
        attention: AttentionBackend,
        *,
        embedding: EmbeddingTable | None = None,
        device: torch.device,
        overlap: bool = True,
        depth: int = 2,
    ) -> None:
        self._model = model
        self._weights = weights
        self._kv = kv_cache
        self._attention = attention
        self._embedding = embedding
        self._device = device
        self._overlap = overlap
        self._depth = depth
        self._micro_batches: list[_Running] = []

    def run(
        self,
        plan: SweepPlan,
        tokens: Mapping[int, Sequence[int]],
        choose: Callable[[list[int], torch.Tensor], torch.Tensor],
    ) -> dict[int, int]:
        """Compute `plan`; the next token of every sequence whose rows end in one.

        `tokens` holds each sequence's token ids; `choose(sequences, logits [n, vocab])` picks the
        next ids [n] on the device.
        """
        self._micro_batches = [_Running(batch) for batch in plan.micro_batches]
        self._kv.begin([batch.spans for batch in plan.micro_batches])
        chosen: list[tuple[list[int], torch.Tensor]] = []
        try:
            for step in zigzag(len(self._model.layers), len(self._micro_batches), self._depth):
                self._do(step.action, step.unit, step.micro_batch, tokens)
                if step.action is Action.COMPUTE and step.unit == len(self._model.layers):
                    chosen.extend(self._choose(self._micro_batches[step.micro_batch], choose))
        finally:
            self._micro_batches = []  # paused forward passes hold activations
        if not chosen:
            return {}
        # One copy, and the only wait for the device, at the very end of the sweep.
        ids = torch.cat([ids for _, ids in chosen]).tolist()
        return dict(zip([s for sequences, _ in chosen for s in sequences], ids))

    def _do(
        self, action: Action, unit: int, number: int, tokens: Mapping[int, Sequence[int]]
    ) -> None:
        match action:
            case Action.PREFETCH:
                self._settle(self._weights.prefetch(unit))
            case Action.BIND:
                self._weights.bind(unit)
            case Action.RELEASE:
                self._weights.release(unit)
            case Action.START:
                self._start(number, tokens)
            case Action.FETCH_KV:
                self._settle([self._kv.fetch(unit, number)])
            case Action.STORE_KV:
                self._settle([self._kv.store(unit, number)])
            case Action.COMPUTE:
                running = self._micro_batches[number]
                assert running.forward is not None
                running.logits = running.forward.resume()

    def _settle(self, transfers: Sequence[Transfer | None]) -> None:
        """Without overlap every transfer is over before the next step begins."""
        if not self._overlap:
            for transfer in transfers:
                if transfer is not None:
                    transfer.synchronize()

    def _start(self, number: int, tokens: Mapping[int, Sequence[int]]) -> None:
        running = self._micro_batches[number]
        spans = running.batch.spans
        ids = [token for s in spans for token in tokens[s.sequence][s.start : s.end]]
        positions = torch.cat([torch.arange(s.start, s.end) for s in spans])
        ends = torch.tensor([s.length for s in spans]).cumsum(0) - 1
        wanted = ends[torch.tensor([s.wants_logits for s in spans])]
        input_ids = torch.tensor(ids)
        if self._embedding is not None:
            input_ids = self._embedding.bind(input_ids, self._model.embedding)
        running.forward = self._model.forward(
            lambda *call: self._attend(number, *call),
            input_ids.to(self._device),
            positions.to(self._device),
            # The head always gets a row, so that its weights are used as planned.
            (wanted if len(wanted) else ends[:1]).to(self._device),
        )
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
        forward = self._micro_batches[number].forward
        assert forward is not None
        self._kv.append(forward.unit, number, key, value)
        groups = self._kv.view(forward.unit, number)
        return self._attention.run(query, key, value, groups, options)

    def _choose(
        self, running: _Running, choose: Callable[[list[int], torch.Tensor], torch.Tensor]
    ) -> list[tuple[list[int], torch.Tensor]]:
        sequences = [span.sequence for span in running.batch.spans if span.wants_logits]
        logits, running.logits, running.forward = running.logits.logits[0], None, None
        return [(sequences, choose(sequences, logits))] if sequences else []
