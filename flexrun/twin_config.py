"""Makes a small config of the same architecture out of a model's config."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from flexrun.twin_layers import Settings, keep_layers_of_each_kind

_VOCABULARY = 128
_POSITIONS = 256
_SHORT_POSITIONS = 64
"""Of them, those before longrope changes its frequencies: beyond, no model runs."""
_WINDOW = 8
_EXPERTS = 8
_LARGEST_GROUP = 8
"""Query heads per KV head, at most."""

_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_global_key_value_heads")
_HEAD_DIMS = ("head_dim", "global_head_dim", "swa_head_dim", "kv_channels")
_INNER = (
    "intermediate_size",
    "intermediate_size_mlp",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "expert_ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "word_embed_proj_dim",
)
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_WINDOWS = ("sliding_window", "attention_chunk_size", "floor_scale", "index_topk")
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_FIXED = {
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "zero_expert_num": 2,
}
_ROTARY_SHARES = ("partial_rotary_factor", "rotary_pct")


def twin_config(config: PretrainedConfig) -> PretrainedConfig:
    """A small config of `config`'s architecture, for a random model that behaves like it.

    It has one layer of each kind, the same grouping of heads, the same rotary settings, scales and
    soft caps, few experts, a window of 8 tokens and a vocabulary of 128. Of a model with several
    parts it describes the text part.
    """
    text = config.get_text_config()
    settings = _settings(text)
    keep_layers_of_each_kind(settings, at_least=2)  # one would hide what goes wrong between two
    shrink_ropes = _shrink_heads(settings)
    _shrink_experts(settings)
    _shrink_context(settings, shrink_ropes)
    _shrink_vocabulary(settings)
    settings.update({name: size for name, size in _FIXED.items() if settings.get(name)})
    settings["dtype"] = "float32"
    return type(text).from_dict(settings)


def few_layers(
    config: PretrainedConfig, copies: int, *, whole_head: bool
) -> tuple[PretrainedConfig, list[float]]:
    """A config with at most so many layers of each kind, in full size.

    Its vocabulary is small but for a `whole_head`. With it, how many of `config`'s layers each of
    them stands for; none where the config does not say how many it has.
    """
    text = config.get_text_config()
    settings = _settings(text)
    counts = keep_layers_of_each_kind(settings, copies)
    if not whole_head:
        _shrink_vocabulary(settings)
    return type(text).from_dict(settings), counts


def _settings(text: PretrainedConfig) -> Settings:
    settings: Settings = copy.deepcopy(text.to_dict())
    for name in ("quantization_config", "_name_or_path", "transformers_version"):
        settings.pop(name, None)
    return settings


def _first(settings: Settings, names: tuple[str, ...]) -> int | None:
    """The value of the first of `names` that is set."""
    return next((settings[name] for name in names if settings.get(name)), None)


def _replace(settings: Settings, names: tuple[str, ...], change: Callable[[Any], Any]) -> None:
    """Apply `change` to the fields `names` that are set (to each entry of lists)."""
    for name in names:
        value = settings.get(name)
        if isinstance(value, (list, tuple)):
            settings[name] = [change(entry) for entry in value]
        elif value:
            settings[name] = change(value)


def _shrink_heads(settings: Settings) -> int:
    """Shrink heads and all widths; returns how many numbers of a head are rotated."""
    hidden, heads = _first(settings, _HIDDEN) or 1, _first(settings, _HEADS) or 1
    kv_heads = _first(settings, _KV_HEADS) or heads
    old_dim = _first(settings, _HEAD_DIMS) or hidden // heads
    shares = _rotary_shares(settings)
    dim = next(
        size for size in range(8, 1024, 2) if all(_rotates_pairs(size * share) for share in shares)
    )
    new_heads, new_kv_heads = _head_counts(heads, kv_heads)
    width = hidden / (heads * old_dim)
    new_hidden = new_heads * dim
    latent = bool(settings.get("kv_lora_rank"))
    if settings.get("head_dim") and not latent:  # the hidden size may differ from heads x head_dim
        new_hidden = int(new_hidden * (0.5 if width < 0.75 else 2 if width > 1.5 else 1))

    def inner(size: int) -> int:
        return min(4 * new_hidden, max(16, round(size * new_hidden / hidden / 8) * 8))

    for part in [settings, *(settings.get("per_layer_config") or {}).values()]:
        _replace(part, _HIDDEN, lambda _: new_hidden)
        _replace(part, ("num_attention_heads_per_layer",), lambda n: max(1, n * new_heads // heads))
        _replace(part, _HEADS, lambda _: new_heads)
        _replace(part, _KV_HEADS, lambda n: max(1, n * new_kv_heads // kv_heads))
        _replace(part, _HEAD_DIMS, lambda n: max(dim // 2, n * dim // old_dim))
        _replace(part, _INNER, inner)
        _replace(part, ("query_pre_attn_scalar",), lambda n: dim if n == old_dim else 2 * dim)
    rotated = int(dim * min(shares))
    if latent:
        rotated = _shrink_latent_attention(settings)
    if settings.get("rotary_dim"):
        settings["rotary_dim"] = rotated = dim // 2
    return rotated


def _head_counts(heads: int, kv_heads: int) -> tuple[int, int]:
    """Few heads, as many query heads per KV head as before (up to eight)."""
    if kv_heads == 1:
        return 4, 1
    group = min(heads // kv_heads, _LARGEST_GROUP)
    return (4, 4) if group == 1 else (2 * group, 2)


def _rotates_pairs(size: float) -> bool:
    """Whether `size` numbers, rounded down, make two pairs or more."""
    whole = int(size + 1e-9)
    return whole >= 4 and whole % 2 == 0 and size - whole < 0.05


def _ropes(settings: Settings) -> list[Settings]:
    """The rotary settings: one dict, or one per kind of layer."""
    ropes = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    nested = [value for value in ropes.values() if isinstance(value, dict)]
    return nested or [ropes]


def _rotary_shares(settings: Settings) -> list[float]:
    """The share of each head that is rotated, by kind of layer."""
    shares = [part.get(name) for part in [settings, *_ropes(settings)] for name in _ROTARY_SHARES]
    return [share for share in shares if share] or [1.0]


def _shrink_latent_attention(settings: Settings) -> int:
    """Multi-head latent attention (DeepSeek): keys have a rotated and an unrotated part."""
    rotated, plain = 4, 8
    same = settings.get("v_head_dim") == settings.get("qk_nope_head_dim")
    if settings.get("head_dim"):
        settings["head_dim"] = rotated
    settings["kv_lora_rank"] = 16
    _replace(settings, ("q_lora_rank",), lambda _: 24)
    settings["qk_rope_head_dim"] = rotated
    settings["qk_nope_head_dim"] = plain
    settings["v_head_dim"] = plain if same else plain + rotated
    _replace(settings, ("qk_head_dim",), lambda _: plain + rotated)
    return rotated


def _shrink_experts(settings: Settings) -> None:
    count = _first(settings, _EXPERT_COUNTS)
    if count is None:
        return
    few = min(count, _EXPERTS)

    def top_k(k: int) -> int:
        return min(k, max(2, round(k * few / count)))

    _replace(settings, _EXPERT_COUNTS, lambda _: few)
    _replace(settings, _TOP_K, top_k)
    _replace(settings, _SHARED_EXPERTS, lambda n: min(n, 2))
    groups = settings.get("n_group") or 1
    if groups > 1:  # groups of two experts or more: their two best are summed
        settings["n_group"] = few_groups = min(groups, few // 2)
        settings["topk_group"] = max(1, round(settings["topk_group"] * few_groups / groups))


def _shrink_context(settings: Settings, rotated: int) -> None:
    positions = _first(settings, _CONTEXTS) or _POSITIONS
    factor = min(1.0, _POSITIONS / positions)
    longrope = any(rope.get("rope_type") == "longrope" for rope in _ropes(settings))
    shortest = _SHORT_POSITIONS if longrope else 16

    def original(length: int) -> int:
        return max(shortest, int(length * factor))

    _replace(settings, _WINDOWS, lambda size: min(size, _WINDOW))
    for part in [settings, *_ropes(settings)]:
        _replace(part, _CONTEXTS, lambda size: min(size, _POSITIONS))
        _replace(part, ("original_max_position_embeddings",), original)
        for name in ("short_factor", "long_factor"):
            if part.get(name):
                part[name] = part[name][: rotated // 2]
        if section := part.get("mrope_section"):
            part["mrope_section"] = _split_in_proportion(section, rotated // 2)


def _split_in_proportion(section: list[int], total: int) -> list[int]:
    cuts = [round(sum(section[:end]) * total / sum(section)) for end in range(len(section) + 1)]
    return [stop - start for start, stop in itertools.pairwise(cuts)]


def _shrink_vocabulary(settings: Settings) -> None:
    """A small vocabulary with the special tokens inside, different ones still different."""
    _replace(
        settings,
        ("vocab_size", "vocab_size_per_layer_input"),
        lambda size: min(size, _VOCABULARY),
    )
    moved: dict[int, int] = {}

    def inside(token: Any) -> Any:
        if not isinstance(token, int) or token < _VOCABULARY:
            return token
        return moved.setdefault(token, _VOCABULARY - 1 - len(moved))

    _replace(settings, tuple(name for name in settings if name.endswith("_token_id")), inside)
