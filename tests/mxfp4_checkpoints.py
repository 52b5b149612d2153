"""A tiny gpt-oss whose experts come in MXFP4, with random codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE, byte_tokenizer

SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
EXPERTS, HIDDEN, WIDE, LAYERS = 4, 64, 96, 2
CODES_AND_SCALES = ("_blocks", "_scales")


def tiny_gpt_oss_config(**overrides: Any) -> GptOssConfig:
    """A layer with a short window and one without, with sinks, and four experts in each."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "max_position_embeddings": 2048,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": None,
        "dtype": "float16",
    }
    return GptOssConfig(**settings | overrides)


def random_mxfp4(
    experts: int, outputs: int, inputs: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Any codes, with scales from 1/64 to 1/8."""
    groups = inputs // 32
    codes = torch.randint(0, 256, (experts, outputs, groups, 16), generator=generator)
    scales = torch.randint(121, 125, (experts, outputs, groups), generator=generator)
    return codes.byte(), scales.byte()


def write_mxfp4(directory: Path, dense: Path, **overrides: Any) -> dict[str, torch.Tensor]:
    """The model in `directory`, what its tensors stand for in `dense`: these are returned."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GptOssForCausalLM(tiny_gpt_oss_config(**overrides)).save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)
    shutil.copytree(dense, directory)
    stored, expanded = {}, {}
    for key, values in load_file(dense / "model.safetensors").items():
        if values.dim() != 3:
            stored[key] = values.half()
            expanded[key] = stored[key].float()
            continue
        experts, inputs, outputs = values.shape
        packed = random_mxfp4(experts, outputs, inputs, generator)
        stored |= {key + end: tensor for end, tensor in zip(CODES_AND_SCALES, packed)}
        expanded[key] = convert_moe_packed_tensors(*packed, dtype=torch.float32)
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    save_file(expanded, dense / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"quantization_config": SETTINGS, "dtype": "float16"}
    (directory / "config.json").write_text(json.dumps(config))
    return expanded
