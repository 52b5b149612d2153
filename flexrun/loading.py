"""From a checkpoint to a weight store: what each unit holds, where it goes, and the copying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from offload.embedding import EmbeddingTable
from offload.offload_file import OffloadFile
from offload.placement import TensorSpec, place
from offload.tiers import CACHE_LINE, DISK_BLOCK, Split, Tier, padded
from offload.weights import Weight, WeightStore
from policy_search.model_shape import ModelShape

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from flexrun.model import Model
    from offload.backend import DeviceBackend
    from offload.transfer import TransferEngine


class TensorSource(Protocol):
    """Where weights are read from: a checkpoint, or a model in memory."""

    def load(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and values of each of `names`."""
        ...


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
    def all(self) -> list[Weight]:
        return [*self.resident, *(weight for _, weight in self.placeable)]


def find_weights(model: Model) -> ModelWeights:
    """Sort a model's parameters by the unit that uses them; a tied tensor is one weight."""
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
            weights[id(parameter)] = Weight(first, parameter.shape, parameter.dtype, users)
            number = len(model.layers) if module in head_modules else layer_of.get(module, -2)
            units[id(parameter)] = max(number, units.get(id(parameter), -2))
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


def model_shape(model: Model, weights: ModelWeights, dtype: torch.dtype) -> ModelShape:
    """The numbers that planning needs."""
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
    return ModelShape(
        weight_bytes=sum(weight.nbytes for weight in weights.all),
        largest_layer_bytes=max(sum(w.nbytes for w in layer) for layer in weights.layers),
        head_bytes=sum(weight.nbytes for weight in weights.head),
        hidden_size=int(config.hidden_size),
        widest=widest,
        vocab_size=model.vocab_size,
        kv_bytes_per_token=kv,
        value_bytes=size,
        tensors=tuple(TensorSpec(w.name, unit, w.nbytes) for unit, w in weights.placeable),
    )


@dataclass(slots=True)
class LoadedWeights:
    """The weights at home, and the embedding table if its rows have to be gathered."""

    backend: DeviceBackend
    store: WeightStore
    embedding: EmbeddingTable | None
    file: OffloadFile | None
    placed: dict[Tier, int]
    """Weight bytes on each tier."""

    def close(self) -> None:
        """Give memory and disk space back."""
        if self.embedding is not None:
            self.embedding.close()
        self.store.close()
        if self.file is not None:
            self.file.close()
            self.backend.account.refund(Tier.DISK, self.file.nbytes)


def load_weights(
    model: Model,
    weights: ModelWeights,
    checkpoint: TensorSource,
    split: Split,
    backend: DeviceBackend,
    transfers: TransferEngine,
    directory: Path,
    depth: int,
) -> LoadedWeights:
    """Allocate every home, then fill them unit by unit: memory that is short is known at once."""
    specs = [TensorSpec(w.name, unit, w.nbytes) for unit, w in weights.placeable]
    tiers = place(specs, split)
    on_disk = [w for _, w in weights.placeable if tiers[w.name] is Tier.DISK]
    file = None
    if on_disk:
        # Slack: weights start on cache lines and every unit on a disk block.
        units = len(weights.layers) + 2
        nbytes = sum(padded(w.nbytes, CACHE_LINE) for w in on_disk) + units * DISK_BLOCK
        backend.account.charge(Tier.DISK, nbytes, "the offload file")
        file = OffloadFile(directory, nbytes)
    try:
        store = WeightStore(
            [*weights.layers, weights.head],
            weights.resident,
            [] if weights.tied else [weights.embedding],
            tiers,
            backend,
            transfers,
            file,
            depth,
        )
    except BaseException:
        if file is not None:
            file.close()
        raise
    placed = dict.fromkeys(Tier, 0)
    for weight in weights.all:
        placed[tiers.get(weight.name, Tier.DEVICE)] += weight.nbytes
    loaded = LoadedWeights(backend, store, None, file, placed)
    try:
        _fill(model, weights, checkpoint, store)
    except BaseException:
        loaded.close()
        raise
    table_tier = tiers[weights.embedding.name]
    if table_tier is Tier.DISK or (table_tier is Tier.HOST and not backend.unified):
        home = store.view(weights.embedding.name)
        loaded.embedding = EmbeddingTable(weights.embedding, home, backend, transfers)
    return loaded


def _fill(
    model: Model, weights: ModelWeights, checkpoint: TensorSource, store: WeightStore
) -> None:
    stored = {weight.name for weight in weights.all}
    buffers = dict(model.module.named_buffers())
    persistent = [name for name in model.module.state_dict() if name in buffers]
    outside = [*weights.resident, *([] if weights.tied else [weights.embedding])]
    groups = [
        [weight.name for weight in group] for group in (outside, *weights.layers, weights.head)
    ]
    for names in (persistent, *groups):
        for name, tensor in checkpoint.load(names):
            if name in buffers:
                buffers[name].copy_(tensor)
            elif name in stored:
                store.load(name, tensor)
