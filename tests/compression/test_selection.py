"""What is quantized of a model's tensors and of its KV cache."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.selection import Quantization, experts_of
from compression.spec import GroupFormat
from tests.families import FAMILIES, config_of


@pytest.mark.parametrize(
    ("name", "shape", "in_layer", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", (128, 64), True, 4),
        ("model.layers.0.mlp.experts.up_proj", (8, 32, 64), True, 4),
        ("model.layers.0.mlp.gate.weight", (8, 1024), True, None),
        ("model.layers.0.input_layernorm.weight", (8192,), True, None),
        ("model.layers.0.tiny.weight", (63, 65), True, None),
        ("model.layers.0.kept.weight", (128, 64), True, None),
        ("lm_head.weight", (256, 64), False, 8),
    ],
)
def test_what_is_quantized(name, shape, in_layer, expected):
    """Large matrices, with their stacks; no router, no norm, nothing small or kept."""
    quantization = Quantization(weight_bits=4, head_bits=8, group=32, keep=r"kept\.")
    for dtype in ("float32", "bfloat16", "float16"):
        spec = None
        if expected is not None:
            spec = GroupFormat(expected, 32, "float16" if dtype == "float16" else "bfloat16")
        assert quantization.of(name, shape, dtype, in_layer=in_layer, experts=8) == spec


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_has_its_norms_or_routers_quantized(family):
    """All that is quantized is multiplied with rows, and no router's scores come out."""
    more = {"use_qk_norm": True} if family == "cohere" else {}
    config = config_of(family, **more)
    experts = experts_of(config.get_text_config().to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    chosen = Quantization(weight_bits=4)
    names = []
    for module_name, module in model.named_modules():
        for attribute, values in module._parameters.items():
            name = f"{module_name}.{attribute}"
            if values is None or not chosen.of(
                name, values.shape, "float32", in_layer=True, experts=experts
            ):
                continue
            names.append(name)
            kind = type(module).__name__
            assert "norm" not in kind.lower(), name
            assert not re.search("router|gate$", kind, re.IGNORECASE), name
            assert values.shape[0] != experts or values.dim() == 3, name
    assert names


def test_nothing_is_quantized_unless_asked_for():
    """Sixteen bits are the values as they are."""
    plain = Quantization()
    assert not plain.any
    assert plain.kv_groups("bfloat16") is None
    assert plain.of("model.layers.0.up", (999, 999), "float16", in_layer=True, experts=0) is None
    assert plain.of("lm_head", (999, 999), "float16", in_layer=False, experts=0) is None


def test_keys_and_values_are_no_weights():
    """Their format follows from the type that is computed in, and no weight is quantized."""
    chosen = Quantization(kv_bits=4, group=32)
    assert chosen.kv_groups("float16") == GroupFormat(4, 32, "float16")
    assert chosen.kv_groups("bfloat16") == GroupFormat(4, 32, "bfloat16")
    assert chosen.kv_groups("float32") == GroupFormat(4, 32, "bfloat16")
    assert not chosen.any
    assert chosen.of("model.layers.0.up", (999, 999), "float16", in_layer=True, experts=0) is None


def test_experts_are_counted_by_any_name():
    """As families call them."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        assert experts_of({name: 16}) == 16
    assert experts_of({"num_experts": None, "hidden_size": 64}) == 0
