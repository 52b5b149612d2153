"""From a checkpoint to a weight store: what each unit holds, where it goes, and the copying."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from compression.selection import Quantization, experts_of
from flexrun.disk_weights import open_charged
from offload.embedding import EmbeddingTable
from offload.packed import pack, unpack
from offload.placement import TensorSpec, place
from offload.prepared import PreparedStore
from offload.slabs import Weight
from offload.tiers import Split, Tier
from offload.weights import WeightStore
from policy_search.model_shape import ModelShape, product_flops

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compression.spec import GroupFormat
    from flexrun.disk_weights import DiskPlan, TensorSource
    from flexrun.model import Model
    from offload.backend import DeviceBackend
    from offload.prepared_writer import TensorSource as TensorReader
    from offload.transfer_engine import TransferEngine

logger = logging.getLogger(__name__)

NOTHING_QUANTIZED = Quantization()


@dataclass(slots=True)
class ModelWeights:
    """Every stored tensor of a model, by the unit that uses it."""

    layers: list[list[Weight]]
    head: list[Weight]
    embedding: Weight
    tied: bool
    """The head uses the embedding table."""
    resident: list[Weight]
    """Small ones outside all units: the final norm, a position table."""

    @property
    def placeable(self) -> list[tuple[int, Weight]]:
        """Weights with the unit they are used in; the embedding table, if it is its own, is -1."""
        units = [*self.layers, self.head]
        own = [] if self.tied else [(-1, self.embedding)]
        return own + [(number, weight) for number, unit in enumerate(units) for weight in unit]

    @property
    def units(self) -> list[list[Weight]]:
        """All of them, in the order that they are used in and lie on disk."""
        own = [] if self.tied else [self.embedding]
        return [[*self.resident, *own], *self.layers, self.head]

    @property
    def quantized(self) -> bool:
        """Whether some are; then all are read from a prepared store."""
        return any(weight.spec is not None for weight in self.all)

    @property
    def all(self) -> list[Weight]:
        return [*self.resident, *(weight for _, weight in self.placeable)]


def find_weights(
    model: Model,
    quantization: Quantization = NOTHING_QUANTIZED,
    packed: Mapping[str, GroupFormat] = MappingProxyType({}),
) -> ModelWeights:
    """Sort a model's parameters by the unit that uses them; a tied tensor is one weight.

    `packed`: formats of those that the checkpoint has quantized already.
    """
    weights: dict[int, Weight] = {}
    units: dict[int, int] = {}
    layer_of = {
        submodule: number
        for number, layer in enumerate(model.layers)
        for submodule in layer.modules()
    }
    head_modules = set(model.head.modules())
    for module_name, module in model.module.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{module_name}.{attribute}" if module_name else attribute
            known = weights.get(id(parameter))
            users = ((module, attribute),) if known is None else (*known.users, (module, attribute))
            first = name if known is None else known.name
            stored = model.stored_dtypes[first]
            weights[id(parameter)] = Weight(first, parameter.shape, stored, users, parameter.dtype)
            number = len(model.layers) if module in head_modules else layer_of.get(module, -2)
            units[id(parameter)] = max(number, units.get(id(parameter), -2))
    for key, weight in weights.items():
        spec = packed.get(weight.name) or _spec_of(weight, units[key], model, quantization)
        weights[key] = replace(weight, spec=spec)
    table = model.embedding.weight
    assert isinstance(table, torch.Tensor)
    embedding = weights[id(table)]
    tied = units[id(table)] == len(model.layers)
    grouped: list[list[Weight]] = [[] for _ in range(len(model.layers) + 1)]
    resident = []
    for key, weight in weights.items():
        if units[key] >= 0:
            grouped[units[key]].append(weight)
        elif weight is not embedding:
            resident.append(weight)
    return ModelWeights(grouped[:-1], grouped[-1], embedding, tied, resident)


def _spec_of(
    weight: Weight, unit: int, model: Model, quantization: Quantization
) -> GroupFormat | None:
    in_layer = 0 <= unit < len(model.layers)
    table = any(module is model.embedding for module, _ in weight.users)
    if not weight.dtype.is_floating_point or not (in_layer or unit == len(model.layers) or table):
        return None
    experts = experts_of(model.config.get_text_config().to_dict())
    dtype = str(weight.dtype).removeprefix("torch.")
    return quantization.of(weight.name, weight.shape, dtype, in_layer=in_layer, experts=experts)


def model_shape(
    model: Model, weights: ModelWeights, dtype: torch.dtype, disk: DiskPlan
) -> ModelShape:
    """The numbers that planning needs; `dtype` is the one that is computed in."""
    size = dtype.itemsize
    kv = tuple(s.kv_heads * (s.key_dim + s.value_dim) * size for s in model.attention)
    config = model.config.get_text_config()
    # Stacked matrices are experts': each row visits some of them.
    experts_per_row = getattr(config, "num_experts_per_tok", None) or 1
    widest = max(
        max(weight.shape[-2:]) * (experts_per_row if len(weight.shape) == 3 else 1)
        for layer in weights.layers
        for weight in layer
        if len(weight.shape) > 1
    )
    units = [*weights.layers, weights.head]
    return ModelShape(
        weight_bytes=sum(weight.nbytes for weight in weights.all),
        largest_layer_bytes=max(sum(w.nbytes for w in layer) for layer in weights.layers),
        head_bytes=sum(weight.nbytes for weight in weights.head),
        hidden_size=int(config.hidden_size),
        widest=widest,
        vocab_size=model.vocab_size,
        kv_bytes_per_token=kv,
        value_bytes=size,
        query_values=max(s.query_heads * s.key_dim for s in model.attention),
        output_values=max(s.query_heads * (s.value_dim + 1) for s in model.attention),
        flops_per_row=sum(
            product_flops(w.shape, experts_per_row) for layer in weights.layers for w in layer
        ),
        head_flops_per_row=2 * int(config.hidden_size) * model.vocab_size,
        expanded_bytes=max(sum(w.expanded_bytes for w in unit) for unit in units),
        prepared_bytes=disk.to_write,
        always_prepared=weights.quantized,
        tensors=tuple(
            TensorSpec(w.name, unit, w.nbytes, disk.places[w.name]) for unit, w in weights.placeable
        ),
    )


@dataclass(slots=True)
class LoadedWeights:
    """The weights at home, and the embedding table if its rows have to be gathered."""

    store: WeightStore
    embedding: EmbeddingTable | None
    placed: dict[Tier, int]
    """Weight bytes on each tier."""
    _closing: contextlib.ExitStack

    def close(self) -> None:
        """Give memory and files back."""
        self._closing.close()


def load_weights(
    model: Model,
    weights: ModelWeights,
    checkpoint: TensorSource,
    split: Split,
    backend: DeviceBackend,
    transfers: TransferEngine,
    disk: DiskPlan,
    depth: int,
    max_rows: int,
    smallest_relay: int = 0,
) -> LoadedWeights:
    """Allocate every home, then fill them unit by unit: memory that is short is known at once."""
    specs = [TensorSpec(w.name, unit, w.nbytes) for unit, w in weights.placeable]
    tiers = place(specs, split)
    with contextlib.ExitStack() as closing:
        source = None
        if Tier.DISK in tiers.values() or weights.quantized:
            source = open_charged(disk, backend.account)
            closing.callback(backend.account.refund, Tier.DISK, disk.to_write)
            closing.callback(source.close)
        store = WeightStore(
            [*weights.layers, weights.head],
            weights.resident,
            [] if weights.tied else [weights.embedding],
            tiers,
            backend,
            transfers,
            source,
            depth,
            smallest_relay,
        )
        closing.callback(store.close)
        if weights.quantized:
            assert isinstance(source, PreparedStore)
            _fill(model, weights, checkpoint, source, store, tiers)
        else:
            _fill(model, weights, checkpoint, checkpoint, store, tiers)
        packed: list[Weight] = []
        closing.callback(unpack, packed)
        for weight in _packable(model, weights, tiers, backend):
            if pack(weight, _home(store, weight)):
                packed.append(weight)
        logger.info("%d matrices are in the order of this processor's products", len(packed))
        embedding = _embedding_table(weights.embedding, tiers, store, backend, transfers, max_rows)
        if embedding is not None:
            closing.callback(embedding.close)
        placed = dict.fromkeys(Tier, 0)
        for weight in weights.all:
            placed[tiers.get(weight.name, Tier.DEVICE)] += weight.nbytes
        return LoadedWeights(store, embedding, placed, closing.pop_all())


def _packable(
    model: Model, weights: ModelWeights, tiers: Mapping[str, Tier], backend: DeviceBackend
) -> list[Weight]:
    """Weights that stay where a CPU computes with them, in products and nothing else.

    Those that are streamed would have to be reordered in every sweep, which takes longer than it
    saves; for as many rows as hide their way from disk it saves little.
    """
    if backend.device.type != "cpu":
        return []
    here = {Tier.DEVICE, Tier.HOST} if backend.unified else {Tier.DEVICE}
    units = [*weights.layers, weights.head]
    return [w for unit in units for w in unit if w.name in model.products and tiers[w.name] in here]


def _home(store: WeightStore, weight: Weight) -> torch.Tensor:
    home = store.view(weight.name)
    assert isinstance(home, torch.Tensor)
    return home


def _embedding_table(
    table: Weight,
    tiers: Mapping[str, Tier],
    store: WeightStore,
    backend: DeviceBackend,
    transfers: TransferEngine,
    max_rows: int,
) -> EmbeddingTable | None:
    tier = tiers[table.name]
    ready = tier is Tier.DEVICE or (tier is Tier.HOST and backend.unified)
    if ready and not table.expanded_bytes:
        return None
    home = store.view(table.name)
    return EmbeddingTable(table, home, tier, backend, transfers, max_rows)


def _fill(
    model: Model,
    weights: ModelWeights,
    checkpoint: TensorReader,
    source: TensorReader,
    store: WeightStore,
    tiers: Mapping[str, Tier],
) -> None:
    """Buffers from `checkpoint`, weights from `source`, where they may be quantized already."""
    in_memory = {w.name for w in weights.all if tiers.get(w.name) is not Tier.DISK}
    buffers = dict(model.module.named_buffers())
    persistent = [name for name in model.module.state_dict() if name in buffers]
    groups = [[w.name for w in unit if w.name in in_memory] for unit in weights.units]
    for name, tensor in checkpoint.load(persistent):
        buffers[name].copy_(tensor)
    for names in groups:
        for name, tensor in source.load(names):
            store.load(name, tensor)
    store.finish_loading()
