"""Families of decoder models, as the default configs of transformers describe them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

# Some default configs leave out what every real model of the family sets.
INCOMPLETE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "nemotron": {"num_key_value_heads": 8},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "hunyuan_v1_dense": {"head_dim": 128, "num_key_value_heads": 8},
}
FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "opt",
    "gpt2",
    "gpt_neox",
    "gpt_bigcode",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granite",
    "granitemoe",
    "olmo",
    "olmo2",
    "olmo3",
    "starcoder2",
    "stablelm",
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "glm",
    "glm4",
    "glm4_moe",
    "smollm3",
    "llama4_text",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "seed_oss",
    "persimmon",
    "nemotron",
    "arcee",
    "apertus",
    "bitnet",
    "gpt_oss",
    "helium",
    "phimoe",
    "dots1",
    "nanochat",
    "hunyuan_v1_dense",
    "gemma4_text",
    "biogpt",
    "minimax_m2",
]


def config_of(family: str, **settings: Any) -> PretrainedConfig:
    """The family's default config, with what the default leaves out and `settings`."""
    return AutoConfig.for_model(family, **INCOMPLETE.get(family, {}) | settings)
