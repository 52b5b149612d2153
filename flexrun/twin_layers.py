"""Which layers a small twin of a model keeps: one of each kind, in the model's order."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers")
"""The first so many layers have no experts."""
_INDICES = ("mlp_only_layers", "moe_layers")
"""Lists of layer numbers."""


def keep_layers_of_each_kind(settings: Settings, copies: int = 1, at_least: int = 1) -> list[float]:
    """Cut `settings` (a config as a dict) down to few layers that show every kind.

    Layers differ by any list with one entry per layer (layer_types, mlp_layer_types,
    no_rope_layers, ...), by having experts or not, and by borrowing another layer's keys. At most
    `copies` of a kind are kept, and of a single kind `at_least` so many. Returns how many of the
    model's layers each of those stands for; empty where the config does not say how many it has.
    """
    count_field = next((name for name in _COUNTS if settings.get(name)), None)
    if count_field is None:
        return []
    count: int = settings[count_field]
    kinds = [_kind(settings, layer, count) for layer in range(count)]
    if len(kinds) == kinds.count(kinds[0]):
        copies = max(copies, at_least)
    kept = [layer for layer, kind in enumerate(kinds) if kinds[:layer].count(kind) < copies]
    for name in _per_layer_lists(settings, count):
        settings[name] = [settings[name][layer] for layer in kept]
    _renumber_experts(settings, kept)
    if overrides := settings.get("per_layer_config"):
        by_layer = {int(layer): value for layer, value in overrides.items()}
        settings["per_layer_config"] = {
            new: by_layer[old] for new, old in enumerate(kept) if old in by_layer
        }
    if shared := settings.get("num_kv_shared_layers"):
        settings["num_kv_shared_layers"] = sum(layer >= count - shared for layer in kept)
    settings[count_field] = len(kept)
    left = [kinds[layer] for layer in kept]
    return [kinds.count(kind) / left.count(kind) for kind in left]


def _per_layer_lists(settings: Settings, count: int) -> list[str]:
    return [
        name
        for name, value in settings.items()
        if isinstance(value, (list, tuple))
        and len(value) == count
        and name not in _INDICES
        and not name.endswith(("_id", "_ids", "architectures"))
    ]


def _kind(settings: Settings, layer: int, count: int) -> list[Any]:
    overrides = {int(key): value for key, value in (settings.get("per_layer_config") or {}).items()}
    return [
        *(settings[name][layer] for name in _per_layer_lists(settings, count)),
        *(layer < (settings.get(name) or 0) for name in _DENSE_FIRST),
        *(layer in (settings.get(name) or ()) for name in _INDICES),
        _has_experts_by_period(settings, layer),
        layer >= count - (settings.get("num_kv_shared_layers") or 0),
        overrides.get(layer),
    ]


def _has_experts_by_period(settings: Settings, layer: int) -> bool:
    if "moe_layer_interval" in settings:  # ernie4_5_moe
        first, last = settings["moe_layer_start_index"], settings["moe_layer_end_index"]
        last = layer if last == -1 else last
        period: int = settings["moe_layer_interval"]
        return bool(first <= layer <= last and (layer + 1) % period == 0)
    period = settings.get("decoder_sparse_step") or 1
    return (layer + 1) % period == 0


def _renumber_experts(settings: Settings, kept: list[int]) -> None:
    sparse = [_has_experts_by_period(settings, layer) for layer in kept]
    for name in _DENSE_FIRST:
        if settings.get(name):
            settings[name] = sum(layer < settings[name] for layer in kept)
    if "moe_layer_interval" in settings:
        with_experts = [new for new, has_experts in enumerate(sparse) if has_experts]
        settings["moe_layer_interval"] = 1
        settings["moe_layer_start_index"] = with_experts[0] if with_experts else len(kept)
        settings["moe_layer_end_index"] = with_experts[-1] if with_experts else len(kept)
    if settings.get("moe_layers") is not None:
        settings["moe_layers"] = [
            new for new, old in enumerate(kept) if old in settings["moe_layers"]
        ]
    if "decoder_sparse_step" in settings:
        dense = settings.get("mlp_only_layers") or ()
        settings["mlp_only_layers"] = [
            new
            for new, (old, has_experts) in enumerate(zip(kept, sparse))
            if old in dense or not has_experts
        ]
        settings["decoder_sparse_step"] = 1
