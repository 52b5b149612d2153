"""A twin has the model's architecture, is small, and is random in every part."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from flexrun.twin import random_twin
from flexrun.twin_config import twin_config
from tests.families import FAMILIES, config_of


@pytest.mark.parametrize("family", FAMILIES)
def test_twin_runs_and_is_small(family: str):
    """The family's twin has under a million weights and computes finite, distinct logits."""
    config = config_of(family)
    before = config.to_dict()
    model = random_twin(config, seed=1)
    assert config.to_dict() == before
    assert model.config.model_type == config.model_type
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    tokens = torch.randint(3, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    other = torch.cat([(tokens[:, :14] + 7) % 100, tokens[:, 14:]], dim=1)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0]
        moved = model(other, use_cache=False).logits[0]
    assert torch.isfinite(logits).all()
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).median() > 0.02 * logits.std()
    assert (logits.argmax(-1) != moved.argmax(-1))[14:].any(), "earlier tokens must matter"


@pytest.mark.parametrize("family", FAMILIES)
def test_twin_of_a_twin_is_the_same(family: str):
    """A twin's config is its own twin."""
    twin = twin_config(config_of(family))
    assert twin_config(twin).to_dict() == twin.to_dict()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"),
    [(32, 32, (4, 4)), (32, 8, (8, 2)), (9, 3, (6, 2)), (12, 1, (4, 1)), (96, 4, (16, 2))],
)
def test_heads_keep_their_grouping(heads: int, kv_heads: int, expected: tuple[int, int]):
    """As many query heads share a KV head as before, up to eight."""
    settings = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    twin = twin_config(config_of("llama", hidden_size=heads * 64, head_dim=64, **settings))
    assert (twin.num_attention_heads, twin.num_key_value_heads) == expected


def test_hidden_size_may_differ_from_the_heads():
    """Where heads x head_dim is not the hidden size, it is not in the twin either."""
    config = config_of("qwen3", hidden_size=1024, num_attention_heads=16, head_dim=128)
    twin = twin_config(config)
    assert twin.hidden_size == twin.num_attention_heads * twin.head_dim // 2


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "cohere2", "olmo3", "gpt_oss"])
def test_every_layer_type_is_kept(family: str):
    """Sliding and full attention layers both appear, in the model's order, with a small window."""
    config = config_of(family)
    twin = twin_config(config)
    assert twin.layer_types == list(dict.fromkeys(config.layer_types))
    assert twin.num_hidden_layers == 2
    assert twin.sliding_window == 8


def test_layers_without_rotary_positions_are_kept():
    """A layer with and one without rotary positions appear."""
    assert set(twin_config(config_of("smollm3")).no_rope_layers) == {0, 1}
    twin = twin_config(config_of("llama4_text"))
    assert list(zip(twin.no_rope_layers, twin.layer_types)) == [
        (1, "chunked_attention"),
        (0, "full_attention"),
    ]


@pytest.mark.parametrize(
    ("family", "settings", "expert_layers"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 3}, [False, True]),
        ("deepseek_v3", {"first_k_dense_replace": 0}, [True, True]),
        ("glm4_moe", {"first_k_dense_replace": 1}, [False, True]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, [False, True]),
        ("qwen2_moe", {"mlp_only_layers": [3, 4]}, [True, False]),
        ("llama4_text", {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 1000}, None),
        ("ernie4_5_moe", {}, [False, True]),
        ("ernie4_5_moe", {"moe_layer_start_index": 0, "moe_layer_end_index": 4}, [True, False]),
    ],
)
def test_layers_with_and_without_experts_are_kept(family, settings, expert_layers):
    """Dense layers and layers with experts both appear, whatever describes them."""
    model = random_twin(config_of(family, **settings), seed=1)
    found = [
        hasattr(layer, "mlp") and hasattr(layer.mlp, "experts") for layer in model.model.layers
    ]
    if family == "llama4_text":
        found = [layer.is_moe_layer for layer in model.model.layers]
        assert set(found) == {True, False}
    else:
        assert found == expert_layers


def test_experts_are_few_and_grouped():
    """Eight experts, two of them chosen, out of two of four groups."""
    twin = twin_config(config_of("deepseek_v3"))
    assert (twin.n_routed_experts, twin.num_experts_per_tok) == (8, 2)
    assert (twin.n_group, twin.topk_group) == (4, 2)


def test_single_expert_routing_stays_single():
    """A model that chooses one expert still does."""
    assert twin_config(config_of("llama4_text")).num_experts_per_tok == 1


def test_rotary_settings_are_kept():
    """Type, base, share and scales of the rotary positions stay; lists fit the smaller heads."""
    half = 3072 // 32 // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + i for i in range(half)],
        "long_factor": [2.0 + i for i in range(half)],
        "original_max_position_embeddings": 4096,
    }
    config = config_of("phi3", rope_parameters=rope, max_position_embeddings=131072)
    twin = twin_config(config)
    assert twin.rope_parameters["rope_type"] == "longrope"
    assert twin.rope_parameters["short_factor"] == [1.0, 2.0, 3.0, 4.0]
    assert twin.max_position_embeddings == 256
    random_twin(config, seed=1)(torch.arange(20)[None])


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 0.75])
def test_partial_rotary_heads_have_whole_pairs(share: float):
    """The rotated part of a head is a whole number of pairs, whatever its share."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    twin = twin_config(config_of("phi", rope_parameters=rope))
    rotated = twin.hidden_size / twin.num_attention_heads * share
    assert rotated >= 4
    assert rotated % 2 == pytest.approx(0)


def test_sections_of_a_head_fit_it():
    """The sections of multi-axis rotary positions add up to half a head."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    twin = twin_config(config_of("llama", rope_parameters=rope, head_dim=128))
    assert sum(twin.rope_parameters["mrope_section"]) == twin.head_dim // 2


def test_scales_and_caps_are_kept():
    """Soft caps, multipliers and activation stay as they are."""
    twin = twin_config(config_of("gemma2"))
    assert (twin.attn_logit_softcapping, twin.final_logit_softcapping) == (50.0, 30.0)
    assert twin.tie_word_embeddings
    twin = twin_config(config_of("granite", logits_scaling=8.0, embedding_multiplier=12.0))
    assert (twin.logits_scaling, twin.embedding_multiplier) == (8.0, 12.0)


def test_special_tokens_move_inside_the_vocabulary():
    """Special tokens beyond the small vocabulary get ids inside it, still all different."""
    config = config_of("llama", bos_token_id=128000, eos_token_id=[128001, 128009, 2])
    twin = twin_config(config)
    tokens = [twin.bos_token_id, *twin.eos_token_id]
    assert twin.vocab_size == 128
    assert len(set(tokens)) == 4
    assert all(token < 128 for token in tokens)


def test_quantized_model_has_a_plain_twin():
    """The twin of a quantized model is not quantized."""
    config = config_of("llama", quantization_config={"quant_method": "fp8"})
    assert getattr(twin_config(config), "quantization_config", None) is None


def test_model_of_several_parts_has_its_text_part_as_twin():
    """Of a model that also sees, the twin is the language model."""
    assert twin_config(AutoConfig.for_model("gemma3")).model_type == "gemma3_text"


def test_same_seed_gives_the_same_weights():
    """Weights depend on the seed alone, and torch's own random state is left as it was."""
    config = config_of("llama")
    state = torch.random.get_rng_state()
    one, same, other = (random_twin(config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [model.lm_head.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gpt_oss", "gemma2", "deepseek_v3"])
def test_nothing_is_left_at_zero_or_one(family: str):
    """Biases, norms, sinks and routing corrections are perturbed too."""
    model = random_twin(config_of(family), seed=1)
    for name, tensor in model.state_dict().items():
        assert tensor.unique().numel() > tensor.numel() // 2, name
