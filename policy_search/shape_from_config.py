"""The shape of a model in a directory, without building it: weight headers, or a formula."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from compression.errors import QuantizationError
from compression.selection import Quantization, experts_of
from compression.spec import nbytes
from offload.disk_layout import DiskPlace
from offload.placement import TensorSpec
from offload.prepared_layout import PREPARED_BLOCK, layout
from offload.tiers import CACHE_LINE, DISK_BLOCK, padded
from policy_search.errors import PolicyError
from policy_search.model_shape import ModelShape, kv_bytes, product_flops
from policy_search.stored_shapes import stored_tensors
from policy_search.weight_formula import shapes_by_formula

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compression.prequantized import Prequantized
    from compression.spec import GroupFormat
    from policy_search.model_config import ModelConfig
    from policy_search.stored_shapes import Shapes, StoredTensor

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.(?:weight|bias)$")
_NOT_A_WEIGHT = re.compile(
    r"rotary_emb\.inv_freq$|position_ids$|\.attn\.(?:masked_)?bias$|\.attention\.(?:masked_)?bias$"
    r"|\.e_score_correction_bias$|(?:^|\.)(?:vision|visual|audio|multi_modal)[^.]*\."
)
_EXPERT = re.compile(r"(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight$")
_EXPERT_PARTS = {
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w2": "down_proj",
    "down_proj": "down_proj",
}


NOTHING_QUANTIZED = Quantization()
_RESIDENT = -2
"""The unit of weights that no split moves: the final norm, a position table."""


def shape_from_config(
    config: ModelConfig,
    dtype: str,
    computed: str | None = None,
    quantization: Quantization = NOTHING_QUANTIZED,
) -> ModelShape:
    """What the engine would find after building the model with weights of type `dtype`.

    `computed` is the type that products are computed in, where it is another one.

    Exact where the directory has the weights (only their headers are read). Raises `PolicyError`
    or `CheckpointError`.
    """
    computed, layers = computed or dtype, config.number("num_hidden_layers")
    stored = None if config.built_in else stored_tensors(config.directory)
    shapes, specs, formats = _tensors(config, stored, dtype, quantization)
    specs, to_write = _on_disk(config, specs, {} if formats else stored, dtype)
    value_bytes, groups = nbytes((1,), computed), quantization.kv_groups(computed)
    expanded = _expanded_by_unit(config, specs, shapes, formats, dtype, computed)
    stacked = [tensor for tensor in specs if len(shapes[tensor.name]) == 3]
    by_unit = [sum(t.nbytes for t in specs if t.unit == unit) for unit in range(layers + 1)]
    if not all(by_unit):
        raise PolicyError(
            f"{config.directory} has no weights for layer {by_unit.index(0)} of {layers}",
            hint="check that config.json belongs to these weights, and that --model is a "
            "decoder-only model (`flexrun check --model DIR`)",
        )
    return ModelShape(
        weight_bytes=sum(tensor.nbytes for tensor in specs),
        largest_layer_bytes=max(by_unit[:-1]),
        head_bytes=by_unit[-1],
        hidden_size=config.number("hidden_size"),
        widest=max(
            max(shape[-2:]) * (config.experts_per_row if len(shape) == 3 else 1)
            for shape in (shapes[t.name] for t in specs if 0 <= t.unit < layers)
            if len(shape) > 1
        ),
        vocab_size=config.number("vocab_size"),
        kv_bytes_per_token=(kv_bytes(config, groups, value_bytes),) * layers,
        value_bytes=value_bytes,
        kv_row_bytes=(kv_bytes(config, None, value_bytes),) * layers if groups else (),
        query_values=config.number("num_attention_heads") * config.key_dim,
        output_values=config.number("num_attention_heads") * (config.value_dim + 1),
        flops_per_row=sum(
            product_flops(shapes[t.name], config.experts_per_row)
            for t in specs
            if 0 <= t.unit < layers
        ),
        head_flops_per_row=2 * config.number("hidden_size") * config.number("vocab_size"),
        experts=config.experts,
        experts_per_row=config.experts_per_row,
        expert_bytes=sum(tensor.nbytes for tensor in stacked),
        expert_values=sum(prod(shapes[tensor.name]) for tensor in stacked),
        expanded_bytes=max(expanded.values(), default=0),
        expanded_in_sweep=sum(expanded.values()),
        prepared_bytes=to_write,
        always_prepared=bool(formats),
        architecture=config.model_type.removesuffix("_text"),
        tensors=tuple(tensor for tensor in specs if tensor.unit != _RESIDENT),
    )


def _tensors(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor] | None,
    dtype: str,
    quantization: Quantization,
) -> tuple[Shapes, list[TensorSpec], dict[str, GroupFormat]]:
    """Every weight, with its shape, and the formats of those that are quantized."""
    scheme, packed = config.prequantized, set[str]()
    if stored is not None:
        shapes, packed = _as_in_the_model(stored, scheme)
    else:
        shapes = shapes_by_formula(config)
        if scheme is not None and scheme.spec.turned:
            packed = {name for name, shape in shapes.items() if len(shape) == 3}
        elif scheme is not None:  # which matrices it left alone is not known
            bits, group = scheme.spec.bits, scheme.spec.group
            quantization = replace(quantization, weight_bits=bits, group=group)
    specs = _specs(config, shapes, config.number("num_hidden_layers"), dtype)
    formats = _formats(config, specs, shapes, dtype, quantization)
    if scheme is not None:
        formats |= dict.fromkeys(packed, scheme.spec)
        with _refused_by_planner(str(config.directory)):
            for name in packed:
                scheme.check(name, shapes[name])
    sizes = {name: each.nbytes(shapes[name]) for name, each in formats.items()}
    specs = [replace(each, nbytes=sizes.get(each.name, each.nbytes)) for each in specs]
    return shapes, specs, formats


def _expanded_by_unit(
    config: ModelConfig,
    specs: Sequence[TensorSpec],
    shapes: Shapes,
    formats: Mapping[str, GroupFormat],
    dtype: str,
    computed: str,
) -> dict[int, int]:
    """Bytes, in the type that is computed in, of tensors that are stored in another form."""
    units: dict[int, int] = {}
    for spec in specs:
        kind = config.type_of(spec.name, computed)
        same = spec.name not in formats and kind == config.type_of(spec.name, dtype)
        if spec.unit >= 0 and not same:
            expanded = padded(nbytes(shapes[spec.name], kind), CACHE_LINE)
            units[spec.unit] = units.get(spec.unit, 0) + expanded
    return units


def _formats(
    config: ModelConfig,
    specs: Sequence[TensorSpec],
    shapes: Shapes,
    dtype: str,
    quantization: Quantization,
) -> dict[str, GroupFormat]:
    """Of the tensors that are quantized."""
    layers, experts = config.number("num_hidden_layers"), experts_of(config.settings)
    found = {}
    for spec in specs:
        in_layer = 0 <= spec.unit < layers
        tensor = spec.name, shapes[spec.name], dtype
        given = quantization.of(*tensor, in_layer=in_layer, experts=experts)
        if given is not None and spec.unit != _RESIDENT:
            found[spec.name] = given
    return found


def _specs(config: ModelConfig, shapes: Shapes, layers: int, dtype: str) -> list[TensorSpec]:
    """Every weight with its unit: a layer, `layers` for the head, -1 for an embedding table."""
    tied = config.flag("tie_word_embeddings") or not any(_HEAD.search(name) for name in shapes)
    specs = []
    for name, shape in shapes.items():
        if layer := _LAYER.search(name):
            unit = int(layer[1])
            if unit >= layers:
                continue  # layers for drafting several tokens at once, which are not loaded
        elif _HEAD.search(name):
            unit = layers
            if tied:
                continue  # a second copy of the embedding table
        elif _EMBEDDING.search(name):
            unit = layers if tied else -1
        else:
            unit = _RESIDENT
        specs.append(TensorSpec(name, unit, nbytes(shape, config.type_of(name, dtype))))
    return specs


def _on_disk(
    config: ModelConfig,
    specs: Sequence[TensorSpec],
    stored: Mapping[str, StoredTensor] | None,
    dtype: str,
) -> tuple[list[TensorSpec], int]:
    """Where each weight is read from, and the bytes to prepare where the files will not do."""
    places = _in_place(config, specs, stored or {}, dtype)
    if places is not None:
        return [replace(spec, disk=places[spec.name]) for spec in specs], 0
    units: dict[int, list[TensorSpec]] = {}
    for spec in sorted(specs, key=lambda spec: spec.unit):
        units.setdefault(max(spec.unit, -1), []).append(spec)
    offsets, size = layout(list(units.values()))
    return [
        replace(s, disk=DiskPlace("prepared", offsets[s.name], s.nbytes, PREPARED_BLOCK))
        for s in specs
    ], size


def _in_place(
    config: ModelConfig,
    specs: Sequence[TensorSpec],
    stored: Mapping[str, StoredTensor],
    dtype: str,
) -> dict[str, DiskPlace] | None:
    places = {}
    for spec in specs:
        found, kind = stored.get(spec.name), config.type_of(spec.name, dtype)
        if found is None or found.dtype != kind or found.offset % nbytes((1,), kind):
            return None
        places[spec.name] = DiskPlace(found.file, found.offset, spec.nbytes, DISK_BLOCK)
    return places


def _as_in_the_model(
    stored: Mapping[str, StoredTensor], scheme: Prequantized | None
) -> tuple[Shapes, set[str]]:
    """Weights only, with the experts' matrices of a layer stacked as transformers does it.

    Also the names of those that come quantized.
    """
    shapes: Shapes = {}
    packed: set[str] = set()
    for name, shape, quantized in _matrices(stored, scheme):
        if _NOT_A_WEIGHT.search(name):
            continue
        expert = _EXPERT.search(name)
        if expert is None or expert[2] not in _EXPERT_PARTS:
            shapes[name] = shape
            packed |= {name} if quantized else set()
            continue
        part = _EXPERT_PARTS[expert[2]]
        joined = f"{name[: expert.start()]}mlp.experts.{part}"
        count = shapes.get(joined, (0,))[0] + (expert[2] not in ("w3", "up_proj"))
        rows = 2 * shape[0] if part == "gate_up_proj" else shape[0]
        shapes[joined] = (count, rows, shape[1])
        packed |= {joined} if quantized else set()
    return shapes, packed


def _matrices(
    stored: Mapping[str, StoredTensor], scheme: Prequantized | None
) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape, and whether it comes quantized, of every tensor; its parts are one."""
    for name, tensor in stored.items():
        found = None if scheme is None else scheme.part_of(name, tensor.dtype)
        if scheme is None or found is None:
            yield name, tensor.shape, False
        elif found[1] == scheme.codes:
            with _refused_by_planner(f"{tensor.file}: {found[0]} cannot be used"):
                shape = scheme.shape(tensor.shape)
            yield found[0], shape, True


@contextmanager
def _refused_by_planner(what: str) -> Iterator[None]:
    try:
        yield
    except QuantizationError as error:
        raise PolicyError(f"{what}: {error.message}", error.hint) from None
