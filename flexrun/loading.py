"""From a checkpoint to a weight store: what each unit holds, where it goes, and the copying."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compression.selection import experts_of
from flexrun.disk_weights import open_charged
from flexrun.model_weights import NOTHING_QUANTIZED
from offload.embedding import EmbeddingTable
from offload.packed import pack, unpack
from offload.placement import TensorSpec, place
from offload.prepared import PreparedStore
from offload.slabs import Weight
from offload.tiers import Split, Tier
from offload.weights import WeightStore
from policy_search.model_shape import ModelShape, kv_bytes, product_flops

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compression.selection import Quantization
    from flexrun.disk_weights import DiskPlan, TensorSource
    from flexrun.model import Model
    from flexrun.model_weights import ModelWeights
    from offload.backend import DeviceBackend
    from offload.prepared_writer import TensorSource as TensorReader
    from offload.transfer_engine import TransferEngine

logger = logging.getLogger(__name__)


def model_shape(
    model: Model,
    weights: ModelWeights,
    dtype: torch.dtype,
    disk: DiskPlan,
    quantization: Quantization = NOTHING_QUANTIZED,
) -> ModelShape:
    """The numbers that planning needs; `dtype` is the one that is computed in.

    Of the `quantization`, only the KV cache's counts: `weights` are known.
    """
    size = dtype.itemsize
    groups = quantization.kv_groups(str(dtype).removeprefix("torch."))
    plain = tuple(kv_bytes(layer, None, size) for layer in model.attention)
    config = model.config.get_text_config()
    # Stacked matrices are experts': each row visits some of them.
    experts_per_row = getattr(config, "num_experts_per_tok", None) or 1
    widest = max(
        max(weight.shape[-2:]) * (experts_per_row if len(weight.shape) == 3 else 1)
        for layer in weights.layers
        for weight in layer
        if len(weight.shape) > 1
    )
    stacked = [weight for weight in weights.all if len(weight.shape) == 3]
    units = [*weights.layers, weights.head]
    return ModelShape(
        weight_bytes=sum(weight.nbytes for weight in weights.all),
        largest_layer_bytes=max(sum(w.nbytes for w in layer) for layer in weights.layers),
        head_bytes=sum(weight.nbytes for weight in weights.head),
        hidden_size=int(config.hidden_size),
        widest=widest,
        vocab_size=model.vocab_size,
        kv_bytes_per_token=tuple(kv_bytes(layer, groups, size) for layer in model.attention),
        value_bytes=size,
        kv_row_bytes=plain if groups else (),
        query_values=max(s.query_heads * s.key_dim for s in model.attention),
        output_values=max(s.query_heads * (s.value_dim + 1) for s in model.attention),
        flops_per_row=sum(
            product_flops(w.shape, experts_per_row) for layer in weights.layers for w in layer
        ),
        head_flops_per_row=2 * int(config.hidden_size) * model.vocab_size,
        experts=experts_of(config.to_dict()),
        experts_per_row=experts_per_row,
        expert_bytes=sum(weight.nbytes for weight in stacked),
        expert_values=sum(weight.shape.numel() for weight in stacked),
        expanded_bytes=max(sum(w.expanded_bytes for w in unit) for unit in units),
        expanded_in_sweep=sum(w.expanded_bytes for unit in units for w in unit),
        prepared_bytes=disk.to_write,
        always_prepared=weights.quantized,
        architecture=str(config.model_type).removesuffix("_text"),
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
            model.products,
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
