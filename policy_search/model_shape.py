"""Bytes of a model: every formula once, from shapes alone (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compression.spec import GroupFormat
    from offload.paged_kv import LayerShape
    from offload.placement import TensorSpec


def kv_bytes(layer: LayerShape, groups: GroupFormat | None, value_bytes: int) -> int:
    """Of one token's keys and values in `layer`: in `groups` of few bits, or as computed."""
    if groups is None:
        return layer.kv_heads * (layer.key_dim + layer.value_dim) * value_bytes
    return layer.kv_heads * (groups.row_bytes(layer.key_dim) + groups.row_bytes(layer.value_dim))


def product_flops(shape: Sequence[int], experts_per_row: int) -> int:
    """Of one row and a weight of `shape`; of matrices stacked by expert, a row visits some."""
    if len(shape) < 2:
        return 0
    visited = (experts_per_row, *shape[1:]) if len(shape) == 3 else shape
    return 2 * math.prod(visited)


def touched_share(experts: int, experts_per_row: int, rows: float) -> float:
    """The part of a layer's `experts` that at least one of `rows` is expected to visit.

    1 - (1 - k / E)^R: each row visits k of E, any of them alike and whatever others visit.
    """
    return 1 - (1 - min(1.0, experts_per_row / experts)) ** rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What placement and memory planning need to know of a model."""

    weight_bytes: int
    """All stored weights; a tied tensor counts once."""
    largest_layer_bytes: int
    head_bytes: int
    """Weights of the output head (the embedding table where they are tied)."""
    hidden_size: int
    widest: int
    """Most values per row that one operation inside a layer produces (usually the feed-forward)."""
    vocab_size: int
    kv_bytes_per_token: tuple[int, ...]
    """Keys and values of one token in stored pages, per layer."""
    value_bytes: int
    """Bytes of one activation value, and of one key or value as it is computed."""
    kv_row_bytes: tuple[int, ...] = ()
    """Keys and values of one token as they are computed, per layer, if pages store them in fewer
    bits; empty: as in pages."""
    query_values: int = 0
    """Of one row in the widest layer, over all its query heads."""
    output_values: int = 0
    """That attention gives for one row: values of every head, and a log-sum-exp of each."""
    flops_per_row: int = 0
    """Of one row's matrix products in all layers: two for each parameter that the row meets."""
    head_flops_per_row: int = 0
    """Of a row that needs logits, besides."""
    experts: int = 0
    """Of a layer that has some; 0: a dense model."""
    experts_per_row: int = 1
    """That a row visits."""
    expert_bytes: int = 0
    """Of `weight_bytes`, those of experts' matrices: all that a row may not meet."""
    expert_values: int = 0
    """Elements of these matrices."""
    expanded_bytes: int = 0
    """Of the largest unit in the type that is computed in, if weights are stored in another one."""
    expanded_in_sweep: int = 0
    """The same of all units: each is expanded once a sweep."""
    prepared_bytes: int = 0
    """That weights on DISK take of the offload directory: all of them, or none where the files
    that are there can be read as they are."""
    always_prepared: bool = False
    """Weights come from the prepared store whatever the split, because some are quantized."""
    architecture: str = ""
    """The config's model type: models with the same numbers may compute them in different ways."""
    tensors: tuple[TensorSpec, ...] = ()
    """The weights that can be placed: by layer from unit 0 on, then the head's, and -1 for an
    embedding table of its own. Without them, plans are made as if weights could be cut anywhere."""

    def __hash__(self) -> int:
        """Of a few fields: plans of one model ask by it for what they know already."""
        return hash((self.weight_bytes, self.hidden_size, self.kv_bytes_per_token))

    def by_unit(self) -> list[list[TensorSpec]]:
        """The tensors of every layer and, last, of the head."""
        units: list[list[TensorSpec]] = [[] for _ in range(self.num_layers + 1)]
        for tensor in self.tensors:
            if tensor.unit >= 0:
                units[tensor.unit].append(tensor)
        return units

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.kv_bytes_per_token)

    @property
    def resident_bytes(self) -> int:
        """Weights that stay on DEVICE under any split (the final norm and the like)."""
        return self.weight_bytes - _placeable_bytes(self) if self.tensors else 0

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token in stored pages, in all layers."""
        return sum(self.kv_bytes_per_token)

    @property
    def kv_packed(self) -> bool:
        """Whether full pages store keys and values in fewer bits than they are computed with."""
        return bool(self.kv_row_bytes)

    @property
    def kv_rows(self) -> tuple[int, ...]:
        """Keys and values of one token as they are computed, per layer."""
        return self.kv_row_bytes or self.kv_bytes_per_token

    @property
    def attention_flops(self) -> int:
        """Of one row and one position that it attends to, in all layers: a product with the key and
        one with the value (FlashAttention-2, section 3.1: 4 x length^2 x heads x head size).
        """
        return 4 * self.query_values * self.num_layers

    @property
    def expert_flops_per_row(self) -> float:
        """Of one row's products with the experts that it visits, in all layers."""
        if not self.experts:
            return 0.0
        return 2 * self.expert_values * self.experts_per_row / self.experts

    def matrix_bytes(self, rows: float) -> float:
        """Of all layers' matrices, as they are computed with, that one product of `rows` reads.

        Of experts, those that are expected to be visited: see `touched_share`.
        """
        values = self.flops_per_row / 2
        if self.experts:
            touched = touched_share(self.experts, self.experts_per_row, rows)
            values += self.expert_values * (touched - self.experts_per_row / self.experts)
        return values * self.value_bytes

    def workspace_bytes(
        self, micro_batch_rows: int, max_rows: int, logit_rows: int, gathered_tokens: int
    ) -> int:
        """Activations at their peak, beside weights and KV cache.

        A running micro-batch holds its residual stream, the inputs and outputs of the widest
        operation (gate, up and their product) and, in the head, logits in the model's type and in
        float32; every waiting micro-batch holds its residual stream and position embeddings.
        Attention copies one layer's keys and values of `gathered_tokens` positions at a time, and
        expands them if they are packed.
        """
        layer = micro_batch_rows * (4 * self.hidden_size + 3 * self.widest) * self.value_bytes
        head = logit_rows * self.vocab_size * (self.value_bytes + 4)
        waiting = max_rows * 3 * self.hidden_size * self.value_bytes
        copies = zip(self.kv_bytes_per_token, self.kv_row_bytes or (0,) * self.num_layers)
        gathered = gathered_tokens * max(stored + expanded for stored, expanded in copies)
        return max(layer + gathered, head) + waiting

    def working_bytes(self, depth: int) -> int:
        """Working memory when every weight is streamed: a ring of layers and the head's slot."""
        return depth * self.largest_layer_bytes + self.head_bytes


@lru_cache(maxsize=64)
def _placeable_bytes(shape: ModelShape) -> int:
    return sum(tensor.nbytes for tensor in shape.tensors)
