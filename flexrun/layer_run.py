"""The engine around some of a model's layers, all on the device, with random weights."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from flexrun.attention_calibration import device_attention
from flexrun.executor import Executor
from flexrun.measuring import Room
from flexrun.model import build_model
from flexrun.model_weights import find_weights
from flexrun.schedulers import ContinuousScheduler
from flexrun.timed_sweep import median, timed
from flexrun.twin_config import few_layers
from offload.activations import ActivationStore
from offload.errors import CapacityError
from offload.kv_cache import KVCache
from offload.packed import can_pack, pack, unpack
from offload.pages import PagePools
from offload.tiers import Split, Tier
from offload.timeline import Timeline
from offload.transfer_engine import TransferEngine
from offload.weights import WeightStore
from policy_search.model_shape import kv_bytes
from policy_search.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

    from flexrun.model import Model
    from flexrun.timed_sweep import Timed
    from offload.backend import DeviceBackend
    from offload.slabs import Weight
    from policy_search.model_shape import ModelShape

_MOST_BYTES = 512 << 20
"""Of all layers that run: more than most caches hold, as in a job."""
_MOST_HEAD = 256 << 20
"""Bytes of a head that runs whole, and of its table: a larger one is predicted as other products
are."""
_PROMPT_ROWS = {"cpu": (128, 512, 1024), "cuda": (256, 1024, 4096)}
"""Of prompts in a sweep, by the type of device."""
_LOGIT_ROWS = 64
_NEW_TOKENS = 64
_PAGE = Policy().page_tokens
_STEP = 7919
"""Between the first tokens of sequences; a prime number."""
_SCALE = 0.02
"""Of weights: hidden states stay numbers of an ordinary size."""


class Size(NamedTuple):
    """What is computed in a sweep."""

    sequences: int
    """Sequences, …"""
    length: int
    """… and the rows of each prompt, or the positions that each has."""
    generating: bool = False
    """A row each; otherwise their prompts are computed."""

    @property
    def rows(self) -> int:
        """Of the sweep."""
        return self.sequences * (1 if self.generating else self.length)


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
        head = shape.head_flops_per_row // 2 * dtype.itemsize
        self.whole_head = 2 * head <= min(quarter, _MOST_HEAD)  # there may be a table besides
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
        self.sequences_at_once, context = wanted
        longest = self.model.context_length - 2 * _NEW_TOKENS
        self.context = min(context, longest)
        """Positions that sequences attend to."""
        if longest < _NEW_TOKENS:
            raise CapacityError(f"sequences of {self.model.context_length} tokens are too short")
        pools = self._pools(quarter, dtype)
        self.cache = self._cache(pools, dtype, closing)
        moved = self._most_rows, shape.hidden_size * dtype.itemsize, backend, self._transfers
        activations = ActivationStore(Split(device=100), *moved)
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
            self.cache,
            closing.enter_context(device_attention(backend, dtype, self.model.attention)),
            backend,
            self._timeline,
            activations,
            filled_rows=self._most_rows if compiled else 0,
        )
        # Nothing may be on its way when memory is given back.
        closing.callback(self._transfers.close)
        self._last = 0

    @property
    def packs(self) -> bool:
        """Whether matrices may have an order that suits the processor's products."""
        if self._backend.device.type != "cpu":
            return False
        return can_pack() and any(weight.dtype == torch.bfloat16 for weight in self._weights.all)

    @property
    def head_packed(self) -> bool:
        """Whether the head's matrix has it now; a tied one, which is a table too, never has."""
        head = {weight.name for weight in self._weights.head}
        return any(weight.name in head for weight in self._packed)

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
            if not counts:
                raise CapacityError("the config does not say how many layers there are")
            if copies == 1 and layers + others > nbytes:
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
        token = sum(kv_bytes(layer, None, dtype.itemsize) for layer in self.model.attention)
        while self._tokens() * token > nbytes and self.context > _PAGE:
            self.context //= 2
        return PagePools({Tier.DEVICE: self._tokens() // _PAGE}, _PAGE)

    def _cache(
        self, pools: PagePools, dtype: torch.dtype, closing: contextlib.ExitStack
    ) -> KVCache:
        attention = self.model.attention
        cache = KVCache(attention, dtype, pools, self._backend, self._transfers, 0)
        closing.callback(cache.close)
        for layer in range(len(attention)):
            # Memory that was never written is one page of zeros, which caches hold.
            Room.numbers(cache.pool(Tier.DEVICE, layer).raw.view(-1), dtype)
        return cache

    def _tokens(self) -> int:
        each = max(self.context, _PAGE) + _NEW_TOKENS + _PAGE
        prompts = self._most_rows // _LOGIT_ROWS * (_LOGIT_ROWS + _PAGE)
        singles = _LOGIT_ROWS * (_NEW_TOKENS + _PAGE)
        return 2 * max(self.sequences_at_once * each, prompts, singles)

    def pack(self) -> bool:
        """Bring matrices into the order of the processor's products, as those that stay are in a
        job; whether there are any.
        """
        if not self.packs:
            return False
        for weight in self._weights.all:
            if weight.name in self.model.products:
                home = self._store.view(weight.name)
                assert isinstance(home, torch.Tensor)
                if pack(weight, home):
                    self._packed.append(weight)
        return bool(self._packed)

    @contextlib.contextmanager
    def sequences(self, count: int, prompt: int, computed: int = 0) -> Iterator[None]:
        """So many wait, with prompts of this length, of which some rows are taken for computed; at
        the end they are gone.
        """
        names = range(self._last, self._last + count)
        self._last += count
        for name in names:
            self.scheduler.add(name, prompt, prompt + _NEW_TOKENS, computed=computed)
        yield
        for name in names:
            self.scheduler.finish(name)

    def timed(self, size: Size, repeats: int) -> Timed:
        """The median of sweeps of this size."""
        measure = self.generating if size.generating else self.prompts
        return measure(size.sequences, size.length, repeats)

    def generating(self, count: int, context: int, repeats: int) -> Timed:
        """The median of sweeps in which `count` sequences with so many positions generate, after
        one that is not counted. What they attend to are random numbers.
        """
        with self.sequences(count, context, context - 1):
            self.sweep()
            return median([self.sweep() for _ in range(repeats)])

    def prompts(self, count: int, length: int, repeats: int) -> Timed:
        """The median of sweeps of `count` prompts, after one that is not counted."""
        found = []
        for _ in range(repeats + 1):
            with self.sequences(count, length):
                found.append(self.sweep())
        return median(found[1:])

    def sweep(self) -> Timed:
        """Compute whatever the scheduler takes next."""
        start = time.perf_counter()
        plan = self.scheduler.next_sweep()
        vocab = self.model.vocab_size
        # Different ones in each: rows that are alike would all visit the same experts.
        ids = {
            s.sequence: [(_STEP * s.sequence + n) % vocab for n in range(s.end)] for s in plan.spans
        }
        self._executor.run(plan, ids, lambda _, logits: logits.argmax(-1))
        self._backend.synchronize(self._backend.record())
        self.scheduler.commit(plan)
        wall = time.perf_counter() - start
        found = self._timeline.finish()
        self._timeline.intervals.clear()
        return timed(plan, found, self._counts, wall)


def _random(weight: Weight) -> torch.Tensor:
    values = torch.empty(weight.shape, dtype=weight.dtype)
    if not weight.dtype.is_floating_point:
        return values.zero_()
    Room.numbers(values.view(-1).view(torch.uint8), weight.dtype)
    return values.mul_(_SCALE)
