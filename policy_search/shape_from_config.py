"""The shape of a model in a directory, without building it: weight headers, or a formula."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from compression.spec import nbytes
from offload.placement import TensorSpec
from policy_search.errors import PolicyError
from policy_search.model_shape import ModelShape
from policy_search.stored_shapes import stored_shapes
from policy_search.weight_formula import shapes_by_formula

if TYPE_CHECKING:
    from policy_search.model_config import ModelConfig
    from policy_search.stored_shapes import Shapes

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.(?:weight|bias)$")
_NOT_A_WEIGHT = re.compile(
    r"rotary_emb\.inv_freq$|position_ids$|\.attn\.(?:masked_)?bias$|\.attention\.(?:masked_)?bias$"
    r"|(?:^|\.)(?:vision|visual|audio|multi_modal)[^.]*\."
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


_RESIDENT = -2
"""The unit of weights that no split moves: the final norm, a position table."""


def shape_from_config(config: ModelConfig, dtype: str) -> ModelShape:
    """What the engine would find after building the model in `dtype`.

    Exact where the directory has the weights (only their headers are read). Raises `PolicyError`
    or `CheckpointError`.
    """
    stored = stored_shapes(config.directory)
    shapes = shapes_by_formula(config) if stored is None else _as_in_the_model(stored)
    layers = config.number("num_hidden_layers")
    specs = _specs(config, shapes, layers, dtype)
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
        kv_bytes_per_token=(nbytes((config.kv_values,), dtype),) * layers,
        value_bytes=nbytes((1,), dtype),
        tensors=tuple(tensor for tensor in specs if tensor.unit != _RESIDENT),
    )


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
        specs.append(TensorSpec(name, unit, nbytes(shape, dtype)))
    return specs


def _as_in_the_model(stored: Shapes) -> Shapes:
    """Weights only, with the experts' matrices of a layer stacked as transformers does it."""
    shapes: Shapes = {}
    for name, shape in stored.items():
        if _NOT_A_WEIGHT.search(name):
            continue
        expert = _EXPERT.search(name)
        if expert is None or expert[2] not in _EXPERT_PARTS:
            shapes[name] = shape
            continue
        part = _EXPERT_PARTS[expert[2]]
        joined = f"{name[: expert.start()]}mlp.experts.{part}"
        count = shapes.get(joined, (0,))[0] + (expert[2] not in ("w3", "up_proj"))
        rows = 2 * shape[0] if part == "gate_up_proj" else shape[0]
        shapes[joined] = (count, rows, shape[1])
    return shapes
