"""Facts about models by name: published counts, and what transformers builds from their sizes."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch

from policy_search.errors import PolicyError
from policy_search.model_config import ModelConfig
from policy_search.named_models import NAMED_MODELS, named_config
from policy_search.shape_from_config import shape_from_config
from policy_search.weight_formula import shapes_by_formula
from tests.policy_search.test_shape_from_config import engine_shape, numbers

PARAMETERS = {
    "opt-6.7b": (6.7e9, 0.05e9),  # OPT's paper, table 1
    "opt-30b": (30e9, 0.5e9),
    "opt-66b": (66e9, 0.5e9),
    "opt-175b": (175e9, 0.5e9),
    "llama-2-13b": (13.02e9, 0.005e9),  # the hub's counts, from here on
    "llama-3-8b": (8.03e9, 0.005e9),
    "llama-3-70b": (70.55e9, 0.005e9),
    "llama-3-405b": (405.85e9, 0.005e9),
    "mixtral-8x7b": (46.70e9, 0.005e9),
    "qwen3-30b-a3b": (30.53e9, 0.005e9),
    "gpt-oss-20b": (20.91e9, 0.006e9),  # gpt-oss's model card, table 1
    "gpt-oss-120b": (116.83e9, 0.005e9),
    "deepseek-v3": (671e9, 0.5e9),  # its README_WEIGHTS.md: the main model
}
MET_BY_A_ROW = {
    "gpt-oss-20b": 3.61e9,  # gpt-oss's model card: active, the head with them, not the embedding
    "gpt-oss-120b": 5.13e9,
    "deepseek-v3": 36.6e9,  # README_WEIGHTS.md: the same
}
KV_KIB = {  # 2 x layers x key and value heads x their size x 2 bytes, from the models' papers
    "opt-30b": 1344,
    "opt-175b": 4608,
    "llama-3-8b": 128,
    "llama-3-70b": 320,
    "qwen3-30b-a3b": 96,
}


def shape_of(name):
    config = NAMED_MODELS[name]
    return shape_from_config(config, *config.types("auto", unified=False))


@pytest.mark.parametrize("name", NAMED_MODELS)
def test_parameters_are_as_many_as_published(name):
    """The formula's shapes have as many elements in sum as the model is said to have."""
    count = sum(prod(shape) for shape in shapes_by_formula(NAMED_MODELS[name]).values())
    published, rounding = PARAMETERS[name]
    assert abs(count - published) <= rounding


@pytest.mark.parametrize("name", MET_BY_A_ROW)
def test_a_row_meets_as_many_parameters_as_published(name):
    """Of experts only those that it visits count, and the output head does."""
    shape = shape_of(name)
    met = (shape.flops_per_row + shape.head_flops_per_row) / 2
    assert met == pytest.approx(MET_BY_A_ROW[name], rel=0.01)


@pytest.mark.parametrize("name", KV_KIB)
def test_keys_and_values_are_as_large_as_published(name):
    """Of one token, in all layers, with 16 bits a value."""
    assert shape_of(name).kv_token_bytes == KV_KIB[name] * 1024


def test_deepseek_caches_full_keys_and_values():
    """128 heads of 192 and 128 values in 61 layers, as the engine does, not latents."""
    assert shape_of("deepseek-v3").kv_token_bytes == 61 * 128 * (192 + 128) * 2


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)])
def test_codes_of_four_bits_take_what_the_checkpoint_takes(name, gib):
    """The model card's size of the checkpoint: experts in MXFP4, the rest in bfloat16."""
    shape = shape_of(name)
    assert shape.weight_bytes / 2**30 == pytest.approx(gib, abs=0.05)
    assert shape.always_prepared
    assert shape.expert_bytes == shape.expert_values * 17 // 32  # 32 codes and a byte


def test_codes_of_eight_bits_have_a_scale_for_128_inputs():
    """DeepSeek-V3's matrices, but for routers, head and embedding: a byte each and its scale."""
    shape = shape_of("deepseek-v3")
    assert shape.always_prepared
    assert shape.expert_values == 58 * 256 * 3 * 7168 * 2048
    assert shape.expert_bytes == shape.expert_values * 132 // 128
    assert shape.head_bytes == 129280 * 7168 * 2
    assert 671e9 < shape.weight_bytes < 671e9 * 132 / 128 + 4e9


@pytest.mark.parametrize("name", NAMED_MODELS)
def test_shapes_are_those_that_transformers_builds(name, tmp_path):
    """Every number, with few layers of the published widths; quantization is tested elsewhere."""
    settings = dict(NAMED_MODELS[name].settings)
    settings.pop("quantization_config", None)
    settings["num_hidden_layers"] = settings.get("first_k_dense_replace", 1) + 1
    (tmp_path / "config.json").write_text(json.dumps(settings))
    planned = shape_from_config(ModelConfig.load(tmp_path), "bfloat16")
    assert numbers(planned) == numbers(engine_shape(tmp_path, torch.bfloat16))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("facebook/opt-30b", "opt-30b"),
        ("OPT-175B", "opt-175b"),
        ("meta-llama/Llama-2-13b-hf", "llama-2-13b"),
        ("meta-llama/Meta-Llama-3-70B", "llama-3-70b"),
        ("meta-llama/Llama-3.1-405B", "llama-3-405b"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
    ],
)
def test_names_are_the_hubs_too(text, name):
    """In any case of letters, with or without the owner."""
    assert named_config(text) is NAMED_MODELS[name]


def test_a_directory_comes_first(tmp_path, monkeypatch):
    """A directory that has a model's name is read; a model by name reads no directory."""
    directory = tmp_path / "opt-30b"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(NAMED_MODELS["llama-3-8b"].settings))
    (directory / "model.safetensors").write_bytes(b"not weights")
    monkeypatch.chdir(tmp_path)
    found = named_config("opt-30b")
    assert (found.model_type, found.built_in) == ("llama", False)
    assert named_config(str(directory)).settings == found.settings
    assert shape_of("opt-30b").weight_bytes > 0


@pytest.mark.parametrize(
    "text", ["org/name", "/models/opt-30b", "./opt-30b", "~nobody/x", "", "a\0"]
)
def test_an_unknown_name_is_refused(text):
    """With all known ones; a path that ends in one of them is still a path."""
    with pytest.raises(PolicyError, match="is not a directory") as caught:
        named_config(text)
    assert all(name in str(caught.value) for name in NAMED_MODELS)
