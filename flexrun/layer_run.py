"""The engine around some of a model's layers, all on the device, with random weights: sweep by
sweep, to find out what they take."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from flexrun.attention_calibration import device_attention
from flexrun.executor import Executor
from flexrun.measuring import Room
from flexrun.model import build_model
from flexrun.model_weights import find_weights
from flexrun.schedulers import ContinuousScheduler
from flexrun.twin_config import few_layers
from offload.activations import ActivationStore
from offload.errors import CapacityError
from offload.kv_cache import KVCache
from offload.packed import pack, unpack
from offload.pages import PagePools
from offload.tiers import Split, Tier
from offload.timeline import COMPUTE, Timeline
from offload.transfer_engine import TransferEngine
from offload.weights import WeightStore
from policy_search.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

    from flexrun.model import Model
    from offload.backend import DeviceBackend
    from offload.slabs import Weight
    from policy_search.model_shape import ModelShape

_MOST_BYTES = 512 << 20
"""Of all layers that run: more than most caches hold, as in a job."""
_MOST_HEAD = 128 << 20
"""Bytes of a head that runs whole."""
_PROMPT_ROWS = {"cpu": (128, 256, 512, 1024), "cuda": (256, 1024, 4096)}
"""Of prompts in a sweep, by the type of device."""
_LOGIT_ROWS = 64
_NEW_TOKENS = 64
_PAGE = Policy().page_tokens
_SCALE = 0.02
"""Of weights: hidden states stay numbers of an ordinary size."""


class Timed(NamedTuple):
    """A sweep of one micro-batch."""

    rows: int
    read: int
    """Positions that single rows attend to, in sum."""
    positions: int
    """That prompts' rows attend to."""
    seconds: float
    """Before the first layer and in all layers of the model, of which only some have run."""
    head: float
    """Seconds of the output head."""
    program: float
    """Seconds of a sweep of all layers in which the device waited, or chose tokens."""
    wall: float
    """Seconds that the sweep really took, with the layers that ran."""

    @property
    def whole(self) -> float:
        """Seconds of the sweep, were it one of the whole model."""
        return self.seconds + self.head + self.program


class LayerRun:
    """Layers of each kind, as many as fit into a part of the device's budget."""

    def __init__(
        self,
        config: PretrainedConfig,
        shape: ModelShape,
        dtype: torch.dtype,
        backend: DeviceBackend,
        wanted: tuple[int, int],
        closing: contextlib.ExitStack,
    ) -> None:
        """`wanted`: sequences that attend, and to how many positions each; `sequences_at_once` and
        `context` are what there is room for. Raises `CapacityError` where there is too little for
        one layer of each kind.
        """
        room = closing.enter_context(Room(backend))
        quarter = room.left(Tier.DEVICE) // 4
        self._backend, self._shape = backend, shape
        self.whole_head = shape.head_flops_per_row // 2 * dtype.itemsize <= min(quarter, _MOST_HEAD)
        self._most_rows = self._rows_within(quarter, room)
        self.prompt_rows = [n for n in _PROMPT_ROWS[backend.device.type] if n <= self._most_rows]
        self.model, self._counts = self._build(config, dtype, 2 * quarter)
        self._weights = find_weights(self.model)
        self._timeline = Timeline(backend, traced=True)
        self._transfers = TransferEngine(backend, self._timeline)
        closing.callback(self._transfers.close)
        self._store = self._load(closing)
        self._packed: list[Weight] = []
        closing.callback(unpack, self._packed)
        self.sequences_at_once, self.context = wanted
        pools = self._pools(quarter, dtype)
        cache = KVCache(self.model.attention, dtype, pools, backend, self._transfers, 0)
        closing.callback(cache.close)
        row_bytes = shape.hidden_size * dtype.itemsize
        here = Split(device=100), self._most_rows, row_bytes, backend, self._transfers
        activations = ActivationStore(*here)
        closing.callback(activations.close)
        self.scheduler = ContinuousScheduler(
            pools,
            max_rows=self._most_rows,
            max_sequences=self._most_rows,
            micro_batch_rows=self._most_rows,
        )
        compiled = backend.device.type == "cpu" and dtype != torch.float32
        self._executor = Executor(
            self.model,
            self._store,
            cache,
            closing.enter_context(device_attention(backend, dtype)),
            backend,
            self._timeline,
            activations,
            filled_rows=self._most_rows if compiled else 0,
        )
        self._last = 0

    def _rows_within(self, nbytes: int, room: Room) -> int:
        """As many as can be computed in so much memory, which is taken. Raises `CapacityError`."""
        for rows in (*_PROMPT_ROWS[self._backend.device.type][::-1], _LOGIT_ROWS):
            needed = self._shape.workspace_bytes(rows, rows, _LOGIT_ROWS, 0)
            if needed <= nbytes:
                break
        room.charge(Tier.DEVICE, needed)
        return rows

    def _build(
        self, config: PretrainedConfig, dtype: torch.dtype, nbytes: int
    ) -> tuple[Model, list[float]]:
        """Raises `CapacityError`."""
        copies = 1
        while True:
            small, counts = few_layers(config, copies, whole_head=self.whole_head)
            model = build_model(small, dtype, self._backend.device)
            weights = find_weights(model)
            layers = sum(weight.nbytes for layer in weights.layers for weight in layer)
            others = sum(weight.nbytes for weight in weights.all) - layers
            if copies == 1 and (layers + others > nbytes or not counts):
                raise CapacityError(
                    f"one layer of each kind takes {layers + others} of {nbytes} bytes"
                )
            most = (min(nbytes - others, _MOST_BYTES) * copies) // layers
            if most <= copies or copies > 1:
                return model, counts
            copies = most

    def _load(self, closing: contextlib.ExitStack) -> WeightStore:
        weights = self._weights
        store = WeightStore(
            [*weights.layers, weights.head],
            weights.resident,
            [] if weights.tied else [weights.embedding],
            {weight.name: Tier.DEVICE for _, weight in weights.placeable},
            self._backend,
            self._transfers,
            disk=None,
            depth=2,
            products=self.model.products,
        )
        closing.callback(store.close)
        for weight in weights.all:
            store.load(weight.name, _random(weight))
        store.finish_loading()
        return store

    def _pools(self, nbytes: int, dtype: torch.dtype) -> PagePools:
        """Room for sequences that attend, and for prompts."""
        token = sum(
            layer.kv_heads * (layer.key_dim + layer.value_dim) * dtype.itemsize
            for layer in self.model.attention
        )
        while self._tokens() * token > nbytes and self.context > _PAGE:
            self.context //= 2
        return PagePools({Tier.DEVICE: self._tokens() // _PAGE}, _PAGE)

    def _tokens(self) -> int:
        each = max(self.context, _PAGE) + _NEW_TOKENS + _PAGE
        prompts = self._most_rows // _LOGIT_ROWS * (_LOGIT_ROWS + _PAGE)
        singles = _LOGIT_ROWS * (_NEW_TOKENS + _PAGE)
        return 2 * max(self.sequences_at_once * each, prompts, singles)

    def pack(self) -> bool:
        """Bring matrices into the order of the processor's products, as those that stay are in a
        job; whether there are any.
        """
        if self._backend.device.type != "cpu":
            return False
        for weight in self._weights.all:
            if weight.name in self.model.products:
                home = self._store.view(weight.name)
                assert isinstance(home, torch.Tensor)
                if pack(weight, home):
                    self._packed.append(weight)
        return bool(self._packed)

    @contextlib.contextmanager
    def sequences(self, count: int, prompt: int) -> Iterator[None]:
        """So many wait, with prompts of this length; at the end they are gone."""
        names = range(self._last, self._last + count)
        self._last += count
        for name in names:
            self.scheduler.add(name, prompt, prompt + _NEW_TOKENS)
        yield
        for name in names:
            self.scheduler.finish(name)

    def generating(self, count: int, context: int, repeats: int) -> Timed:
        """The median of sweeps in which `count` sequences with so many positions generate."""
        with self.sequences(count, context):
            while self.scheduler.waiting or self.scheduler.prompts:
                self.sweep()
            return _median([self.sweep() for _ in range(repeats)])

    def prompts(self, count: int, length: int, repeats: int) -> Timed:
        """The median of sweeps of `count` prompts, after one that is not counted."""
        found = []
        for _ in range(repeats + 1):
            with self.sequences(count, length):
                found.append(self.sweep())
        return _median(found[1:])

    def sweep(self) -> Timed:
        """Compute whatever the scheduler takes next."""
        start = time.perf_counter()
        plan = self.scheduler.next_sweep()
        vocab = self.model.vocab_size
        ids = {s.sequence: [n % vocab for n in range(s.end)] for s in plan.spans}
        self._executor.run(plan, ids, lambda _, logits: logits.argmax(-1))
        self._backend.synchronize(self._backend.record())
        self.scheduler.commit(plan)
        wall = time.perf_counter() - start
        single = [span for span in plan.spans if span.length == 1]
        many = [span for span in plan.spans if span.length > 1]
        return Timed(
            plan.rows,
            sum(span.end for span in single),
            sum(s.length * (2 * s.start + s.length + 1) // 2 for s in many),
            *self._taken(wall),
            wall,
        )

    def _taken(self, wall: float) -> tuple[float, float, float]:
        """Seconds of layers, of the head, and of the rest of `wall`."""
        found = self._timeline.finish()
        self._timeline.intervals.clear()
        counts, layers, head = self._counts, 0.0, 0.0
        for row, name, start, end, _ in found:
            if row != COMPUTE:
                continue
            wall -= end - start
            kind, _, unit = name.partition(" ")
            number = int(unit.split(",")[0]) if kind == "unit" else -1
            if number == len(counts):
                head += end - start
            elif number >= 0:
                layers += (end - start) * counts[number]
            elif kind == "weights":
                layers += (end - start) * sum(counts) / len(counts)
            else:
                layers += end - start
        # A sweep begins and ends as often, however many layers it has.
        steps = (sum(counts) + 2) / (len(counts) + 2)
        return layers, head, max(0.0, wall) * steps


def _median(sweeps: list[Timed]) -> Timed:
    """Of sweeps with the same rows: each of their times by itself."""
    last = sweeps[-1]
    times = zip(*(each[3:] for each in sweeps))
    return Timed(last.rows, last.read, last.positions, *map(statistics.median, times))


def _random(weight: Weight) -> torch.Tensor:
    values = torch.empty(weight.shape, dtype=weight.dtype)
    if not weight.dtype.is_floating_point:
        return values.zero_()
    Room.numbers(values.view(-1).view(torch.uint8), weight.dtype)
    return values.mul_(_SCALE)
