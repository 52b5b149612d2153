"""Facts about model shapes: headers, formula and the built model agree, byte for byte."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from compression.selection import Quantization
from flexrun.disk_weights import plan_disk
from flexrun.loading import model_shape
from flexrun.model import build_model, load_config
from flexrun.model_weights import NOTHING_QUANTIZED, find_weights
from offload.checkpoint import Checkpoint
from offload.errors import CheckpointError
from policy_search.errors import PolicyError
from policy_search.model_config import ModelConfig
from policy_search.shape_from_config import shape_from_config

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 3},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "opt": {"ffn_dim": 48, "num_key_value_heads": 4},
    "deepseek_v2": LATENT | {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True},
    "deepseek_v3": LATENT | {"first_k_dense_replace": 2, "n_group": 2, "topk_group": 1},
}
FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "granite",
    "smollm3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "olmo2",
    "olmoe",
    "gpt_oss",
    "gemma",
    "gemma2",
    "gemma3_text",
    "opt",
    "deepseek_v2",
    "deepseek_v3",
)


class NoFiles:
    """A checkpoint of which only the config is there."""

    def in_place(self, names):
        return None

    def fingerprint(self):
        return b""


def engine_shape(directory, dtype=torch.float32, computed=None, quantization=NOTHING_QUANTIZED):
    computed = computed or dtype
    model = build_model(load_config(directory), computed, torch.device("cpu"), dtype)
    checkpoint: Any = NoFiles()
    if any(directory.glob("*.safetensors")):
        checkpoint = Checkpoint(directory, model.module, dtype, model.stored_dtypes)
    weights = find_weights(model, quantization)
    disk = plan_disk(checkpoint, weights.units, directory / "offload")
    return model_shape(model, weights, computed, disk, quantization)


def planned_shape(directory, dtype="float32"):
    return shape_from_config(ModelConfig.load(directory), dtype)


def numbers(shape):
    """All but what only the files tell: the tensors' names, and where they lie on disk."""
    unknown = ("tensors", "prepared_bytes")
    names = [name for name in shape.__dataclass_fields__ if name not in unknown]
    tensors = sorted((tensor.unit, tensor.nbytes) for tensor in shape.tensors)
    return {name: getattr(shape, name) for name in names} | {"tensors": tensors}


def without_weights(directory, target):
    target.mkdir()
    shutil.copy(directory / "config.json", target)
    return target


@pytest.mark.parametrize("name", ["tiny_llama_dir", "tiny_tied_llama_dir"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_headers_and_formula_agree_with_the_built_model(name, dtype, request, tmp_path):
    """Every number of a Llama's shape is the engine's own, with and without weight files."""
    directory = request.getfixturevalue(name)
    expected = engine_shape(directory, getattr(torch, dtype))
    from_headers = planned_shape(directory, dtype)
    if dtype == "float32":  # as it is stored, so that it is read in place
        assert set(from_headers.tensors) == set(expected.tensors)
    assert from_headers.prepared_bytes == expected.prepared_bytes
    assert (expected.prepared_bytes == 0) == (dtype == "float32")
    assert numbers(from_headers) == numbers(expected)
    bare = without_weights(directory, tmp_path / "bare")
    assert numbers(planned_shape(bare, dtype)) == numbers(expected)


def test_expanded_bytes_are_those_of_the_built_model(tiny_llama_dir):
    """Where 16-bit weights are computed in float32, room for the largest unit is planned."""
    expected = engine_shape(tiny_llama_dir, torch.bfloat16, torch.float32)
    config = ModelConfig.load(tiny_llama_dir)
    assert numbers(shape_from_config(config, "bfloat16", "float32")) == numbers(expected)
    assert expected.expanded_bytes > 0
    assert expected.value_bytes == 4


@pytest.mark.parametrize(
    "quantization",
    [
        Quantization(weight_bits=4),
        Quantization(weight_bits=4, head_bits=8, group=32),
        Quantization(weight_bits=8, keep="mlp"),
        Quantization(head_bits=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["tiny_llama_dir", "tiny_tied_llama_dir"])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_quantized_bytes_are_those_of_the_built_model(name, computed, quantization, request):
    """Of every tensor and of the room to expand them; all are planned to come from a store."""
    directory = request.getfixturevalue(name)
    types = torch.bfloat16, getattr(torch, computed)
    expected = engine_shape(directory, *types, quantization)
    config = ModelConfig.load(directory)
    planned = shape_from_config(config, "bfloat16", computed, quantization)
    assert numbers(planned) == numbers(expected)
    assert planned.prepared_bytes == expected.prepared_bytes > 0
    assert planned.always_prepared
    plain = shape_from_config(config, "bfloat16", computed)
    assert planned.weight_bytes < plain.weight_bytes


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("computed", ["float32", "bfloat16", "float16"])
def test_packed_keys_and_values_are_those_of_the_built_model(tiny_llama_dir, computed, group):
    """Bytes in pages and as they are computed; nothing else of the shape depends on them."""
    quantization, dtype = Quantization(kv_bits=4, group=group), getattr(torch, computed)
    expected = engine_shape(tiny_llama_dir, dtype, quantization=quantization)
    config = ModelConfig.load(tiny_llama_dir)
    planned = shape_from_config(config, computed, quantization=quantization)
    assert numbers(planned) == numbers(expected)
    plain = shape_from_config(config, computed)
    assert planned.kv_rows == plain.kv_bytes_per_token
    assert planned.kv_packed
    assert not plain.kv_packed
    assert planned.kv_token_bytes < plain.kv_token_bytes
    same = replace(planned, kv_bytes_per_token=plain.kv_bytes_per_token, kv_row_bytes=())
    assert same == plain


def test_packed_bytes_of_a_published_model(tmp_path):
    """Llama 3 has 8 heads of 128 values: 64 bytes of codes and two groups' numbers for each."""
    sizes = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    }
    config = ModelConfig(tmp_path, sizes)
    shape = shape_from_config(config, "bfloat16", quantization=Quantization(kv_bits=4))
    assert shape.kv_bytes_per_token == (1152,) * 32
    assert shape.kv_rows == (4096,) * 32


def test_experts_count_as_the_model_stacks_them(tmp_path):
    """A Mixtral checkpoint's many small matrices give the shape of the built model."""
    config = MixtralConfig(**SIZES, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    expected = numbers(engine_shape(tmp_path / "moe"))
    assert numbers(planned_shape(tmp_path / "moe")) == expected
    bare = without_weights(tmp_path / "moe", tmp_path / "bare")
    assert numbers(planned_shape(bare)) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_formula_knows_each_family(family, dtype, tmp_path):
    """Without weight files, every known family has the built model's bytes."""
    config = AutoConfig.for_model(family, **(SIZES | MORE.get(family, {})))
    config.save_pretrained(tmp_path)
    expected = engine_shape(tmp_path, getattr(torch, dtype))
    assert numbers(planned_shape(tmp_path, dtype)) == numbers(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        {"enable_bias": False, "layer_norm_elementwise_affine": False},
        {"tie_word_embeddings": False},
    ],
    ids=["350m", "galactica", "untied"],
)
def test_the_formula_knows_what_opt_models_leave_out(settings, tmp_path):
    """OPT-350M's narrow embedding, Galactica's layers without biases, and a head of its own."""
    sizes = SIZES | MORE["opt"] | settings
    AutoConfig.for_model("opt", **sizes).save_pretrained(tmp_path)
    assert numbers(planned_shape(tmp_path)) == numbers(engine_shape(tmp_path))


def test_what_is_no_parameter_of_a_deepseek_model_is_not_counted(tmp_path):
    """Headers have a bias of each router, which is a buffer, and the type that routers are kept in
    is the model's.
    """
    config = AutoConfig.for_model("deepseek_v3", **(SIZES | MORE["deepseek_v3"]))
    model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    assert any("e_score_correction_bias" in name for name in model.state_dict())
    expected = numbers(engine_shape(tmp_path / "model", torch.bfloat16))
    assert numbers(planned_shape(tmp_path / "model", "bfloat16")) == expected
    bare = without_weights(tmp_path / "model", tmp_path / "bare")
    assert numbers(planned_shape(bare, "bfloat16")) == expected


def test_a_missing_size_is_named(tiny_llama_dir, tmp_path):
    """A config without a size that is needed is refused by the field's name."""
    settings = json.loads((tiny_llama_dir / "config.json").read_text())
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
        rest = {key: value for key, value in settings.items() if key != name}
        (tmp_path / "config.json").write_text(json.dumps(rest))
        with pytest.raises(PolicyError, match=f"has no {name}"):
            planned_shape(tmp_path)


def test_an_unknown_family_needs_its_weights(tiny_llama_dir, tmp_path):
    """Sizes are never guessed: without headers an unknown architecture is refused."""
    settings = json.loads((tiny_llama_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "gpt_neox"}))
    with pytest.raises(PolicyError, match="gpt_neox") as caught:
        planned_shape(tmp_path)
    assert "download the model's weights" in str(caught.value)


def test_a_broken_checkpoint_is_explained(tiny_llama_dir, tmp_path):
    """A truncated file and a missing shard are errors; an index without any file is not."""
    directory = without_weights(tiny_llama_dir, tmp_path / "broken")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert planned_shape(directory).weight_bytes > 0
    (directory / "1.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2\.safetensors"):
        planned_shape(directory)
    (directory / "model.safetensors").write_bytes((99).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        planned_shape(directory)


def test_float16_is_computed_in_float32_on_a_cpu(tmp_path):
    """The type is the engine's choice: the checkpoint's, except for float16 on a CPU."""
    (tmp_path / "config.json").write_text('{"torch_dtype": "float16"}')
    config = ModelConfig.load(tmp_path)
    assert config.types("auto", unified=True) == ("float16", "float32")
    assert config.types("auto", unified=False) == ("float16", "float16")
    assert config.types("float32", unified=True) == ("float32", "float32")
