"""Names and shapes of an OPT model's weights from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from policy_search.model_config import ModelConfig
    from policy_search.stored_shapes import Shapes

_UNUSED_POSITIONS = 2
"""Rows before those of the table of positions: a position's number is that of its row less two."""


def opt_shapes(config: ModelConfig) -> Shapes:
    """Every weight. Raises `PolicyError`.

    Biases and norms may be left out (Galactica), and the embedding may be narrower than the hidden
    state (OPT-350M).
    """
    hidden, vocab = config.number("hidden_size"), config.number("vocab_size")
    narrow = config.optional("word_embed_proj_dim") or hidden
    decoder = "model.decoder."
    shapes: Shapes = {
        f"{decoder}embed_tokens.weight": (vocab, narrow),
        f"{decoder}embed_positions.weight": (config.context_length + _UNUSED_POSITIONS, hidden),
    }
    if narrow != hidden:
        shapes[f"{decoder}project_in.weight"] = hidden, narrow
        shapes[f"{decoder}project_out.weight"] = narrow, hidden
    if not _on(config, "tie_word_embeddings"):
        shapes["lm_head.weight"] = vocab, narrow
    # Models with norms after each part of a layer have none after the last layer.
    if _on(config, "do_layer_norm_before") and not config.flag("_remove_final_layer_norm"):
        shapes |= {decoder + name: shape for name, shape in _norm(config, "final_layer_norm")}
    for layer in range(config.number("num_hidden_layers")):
        prefix = f"{decoder}layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _layer(config, hidden)}
    return shapes


def _layer(config: ModelConfig, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    wide = config.number("ffn_dim")
    matrices = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    for name, shape in (matrices | {"fc1": (wide, hidden), "fc2": (hidden, wide)}).items():
        yield f"{name}.weight", shape
        if _on(config, "enable_bias"):
            yield f"{name}.bias", shape[:1]
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        yield from _norm(config, name)


def _norm(config: ModelConfig, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    if _on(config, "layer_norm_elementwise_affine"):
        for part in ("weight", "bias"):
            yield f"{name}.{part}", (config.number("hidden_size"),)


def _on(config: ModelConfig, name: str) -> bool:
    """A flag that is set unless the config says otherwise."""
    return bool(config.settings.get(name, True))
