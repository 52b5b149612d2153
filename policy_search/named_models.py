"""Well-known models by name: what of their published config.json says how large they are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from policy_search.errors import PolicyError
from policy_search.model_config import ModelConfig

_LLAMA_2_13B = {
    "model_type": "llama",
    "torch_dtype": "float16",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
_MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
_QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "attention_bias": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
_DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "attention_bias": False,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """OPT's paper, table 1; that of 175B parameters is on no hub, but one of the same kind."""
    return {
        "model_type": "opt",
        "torch_dtype": "float16",
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
    }


def _llama_3(hidden: int, wide: int, layers: int, heads: int, context: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
    }


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    """Its config names no type: what is not quantized is bfloat16."""
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    return {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "quantization_config": {
            "modules_to_not_convert": [*kept, "lm_head"],
            "quant_method": "mxfp4",
        },
    }


_SETTINGS = {
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "llama-2-13b": _LLAMA_2_13B,
    "llama-3-8b": _llama_3(4096, 14336, 32, 32, context=8192),
    "llama-3-70b": _llama_3(8192, 28672, 80, 64, context=8192),
    "llama-3-405b": _llama_3(16384, 53248, 126, 128, context=131072),
    "mixtral-8x7b": _MIXTRAL_8X7B,
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "deepseek-v3": _DEEPSEEK_V3,
}
NAMED_MODELS = {
    name: ModelConfig(Path(name), settings, built_in=True) for name, settings in _SETTINGS.items()
}
_HUB_NAMES = {
    "llama-2-13b-hf": "llama-2-13b",
    "meta-llama-3-8b": "llama-3-8b",
    "meta-llama-3-70b": "llama-3-70b",
    "llama-3.1-405b": "llama-3-405b",
    "meta-llama-3.1-405b": "llama-3-405b",
    "mixtral-8x7b-v0.1": "mixtral-8x7b",
}
"""Last parts of the hub's names, where they are other ones."""
_HUB_ID = re.compile(r"(?:\w[\w.-]*/)?(\w[\w.-]*)")


def named_config(text: str) -> ModelConfig:
    """The model in the directory `text`, or one of `NAMED_MODELS`, by that name or the hub's.

    Raises `PolicyError`.
    """
    directory = os.path.expanduser(text)
    if os.path.isdir(directory):
        return ModelConfig.load(Path(directory))
    hub_id = _HUB_ID.fullmatch(text)
    name = hub_id[1].lower() if hub_id else ""
    found = NAMED_MODELS.get(_HUB_NAMES.get(name, name))
    if found is None:
        raise PolicyError(
            f"--model {text} is not a directory, and no model is known by this name",
            hint="give the local directory with the model's config.json; a model of the hub is "
            "downloaded by `hf download NAME --local-dir DIR` (config.json alone is enough for "
            f"common architectures). Known without files: {', '.join(NAMED_MODELS)}",
        )
    return found
