"""Names and shapes of a model's weights from its config alone, for the common decoder families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from policy_search.errors import PolicyError
from policy_search.opt_formula import opt_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from policy_search.model_config import ModelConfig
    from policy_search.stored_shapes import Shapes

    Named = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class _Family:
    """How a family of models differs from Llama."""

    norms: int = 2
    """Norms over the hidden state per layer."""
    query_norm: str = ""
    """A norm of queries and of keys: "head" (one head's values) or "all" heads'."""
    qkv_bias: bool = False
    """Always biased; others are where the config says attention_bias."""
    may_tie: bool = False
    """The head is the embedding table unless the config says otherwise."""
    reads_bias: bool = True
    turned_experts: bool = False
    """gpt-oss: experts have inputs before outputs, and biases; heads have sinks."""
    latent: bool = False
    """DeepSeek: queries, keys and values are made from vectors that are shorter than they are."""


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(reads_bias=False),
    "mixtral": _Family(reads_bias=False),
    "granite": _Family(),
    "smollm3": _Family(may_tie=True),
    "qwen2": _Family(qkv_bias=True, reads_bias=False),
    "qwen3": _Family(query_norm="head"),
    "qwen3_moe": _Family(query_norm="head"),
    "olmo2": _Family(query_norm="all"),
    "olmoe": _Family(query_norm="all"),
    "deepseek_v2": _Family(latent=True),
    "deepseek_v3": _Family(latent=True),
    "gpt_oss": _Family(qkv_bias=True, turned_experts=True),
    "gemma": _Family(may_tie=True),
    "gemma2": _Family(norms=4, may_tie=True),
    "gemma3_text": _Family(norms=4, query_norm="head", may_tie=True),
}


def shapes_by_formula(config: ModelConfig) -> Shapes:
    """Every weight, expert matrices of a layer stacked. Raises `PolicyError`."""
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        config.number(name)
    if config.model_type == "opt":
        return opt_shapes(config)
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise PolicyError(
            f"the sizes of {config.model_type} models are not known from config.json alone",
            hint=f"download the model's weights into {config.directory}: their headers have the "
            f"sizes. Without weights these are known: opt, {', '.join(_FAMILIES)}",
        )
    hidden, vocab = config.number("hidden_size"), config.number("vocab_size")
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.settings.get("tie_word_embeddings", family.may_tie):
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config.number("num_hidden_layers")):
        prefix = f"model.layers.{layer}."
        attention = _latent_attention(config) if family.latent else _attention(config, family)
        for part in (attention, _feed_forward(config, family, layer)):
            shapes |= {prefix + name: shape for name, shape in part}
        shapes |= {f"{prefix}norm{n}.weight": (hidden,) for n in range(family.norms)}
    return shapes


def _attention(config: ModelConfig, family: _Family) -> Named:
    hidden, head_dim = config.number("hidden_size"), config.head_dim
    heads, kv_heads = config.number("num_attention_heads"), config.kv_heads
    bias = family.reads_bias and config.settings.get("attention_bias", family.qkv_bias)
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        yield f"self_attn.{name}_proj.weight", (count * head_dim, hidden)
        if bias or family.qkv_bias:
            yield f"self_attn.{name}_proj.bias", (count * head_dim,)
        if name != "v" and family.query_norm:
            values = head_dim if family.query_norm == "head" else count * head_dim
            yield f"self_attn.{name}_norm.weight", (values,)
    yield "self_attn.o_proj.weight", (hidden, heads * head_dim)
    if bias:
        yield "self_attn.o_proj.bias", (hidden,)
    if family.turned_experts:
        yield "self_attn.sinks", (heads,)


def _latent_attention(config: ModelConfig) -> Named:
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    queries = heads * config.key_dim
    rank, latent = config.optional("q_lora_rank"), config.number("kv_lora_rank")
    bias = config.flag("attention_bias")
    if rank:
        yield "self_attn.q_a_proj.weight", (rank, hidden)
        if bias:
            yield "self_attn.q_a_proj.bias", (rank,)
        yield "self_attn.q_a_layernorm.weight", (rank,)
    yield f"self_attn.q_{'b_' if rank else ''}proj.weight", (queries, rank or hidden)
    shared = latent + config.number("qk_rope_head_dim")
    yield "self_attn.kv_a_proj_with_mqa.weight", (shared, hidden)
    if bias:
        yield "self_attn.kv_a_proj_with_mqa.bias", (shared,)
    yield "self_attn.kv_a_layernorm.weight", (latent,)
    made = config.number("qk_nope_head_dim") + config.value_dim
    yield "self_attn.kv_b_proj.weight", (heads * made, latent)
    yield "self_attn.o_proj.weight", (hidden, heads * config.value_dim)
    if bias:
        yield "self_attn.o_proj.bias", (hidden,)


def _feed_forward(config: ModelConfig, family: _Family, layer: int) -> Named:
    hidden, experts = config.number("hidden_size"), config.experts
    if experts and _has_experts(config, layer):
        wide = config.optional("moe_intermediate_size") or config.number("intermediate_size")
        if family.turned_experts:
            yield from _turned_experts(experts, hidden, wide)
            return
        yield "mlp.gate.weight", (experts, hidden)
        yield "mlp.experts.gate_up_proj", (experts, 2 * wide, hidden)
        yield "mlp.experts.down_proj", (experts, hidden, wide)
        if config.flag("n_shared_experts"):  # of these each row visits all: one wide one
            shared = config.number("n_shared_experts") * wide
            yield from _gated("mlp.shared_experts.", hidden, shared, config.flag("mlp_bias"))
        return
    wide = config.number("intermediate_size")
    yield from _gated("mlp.", hidden, wide, config.flag("mlp_bias"))


def _gated(prefix: str, hidden: int, wide: int, bias: bool) -> Named:
    for name, shape in (("gate", (wide, hidden)), ("up", (wide, hidden)), ("down", (hidden, wide))):
        yield f"{prefix}{name}_proj.weight", shape
        if bias:
            yield f"{prefix}{name}_proj.bias", shape[:1]


def _turned_experts(experts: int, hidden: int, wide: int) -> Named:
    yield "mlp.router.weight", (experts, hidden)
    yield "mlp.router.bias", (experts,)
    for name, inputs, outputs in (("gate_up", hidden, 2 * wide), ("down", wide, hidden)):
        yield f"mlp.experts.{name}_proj", (experts, inputs, outputs)
        yield f"mlp.experts.{name}_proj_bias", (experts, outputs)


def _has_experts(config: ModelConfig, layer: int) -> bool:
    period = config.optional("decoder_sparse_step") or 1
    dense = config.settings.get("mlp_only_layers") or ()
    first = config.number("first_k_dense_replace") if config.flag("first_k_dense_replace") else 0
    return layer >= first and layer not in dense and (layer + 1) % period == 0
