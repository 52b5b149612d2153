"""Checkpoints that come quantized: their own codes on every link, and the tokens they stand for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from compression.groupwise import expand
from compression.selection import Quantization
from compression.spec import GroupFormat
from flexrun import LLM, cli
from flexrun.disk_weights import plan_disk
from flexrun.errors import FlexrunError
from flexrun.loading import model_shape
from flexrun.model import build_model, load_config
from flexrun.model_weights import find_weights
from offload.checkpoint import Checkpoint
from policy_search.model_config import ModelConfig
from policy_search.shape_from_config import shape_from_config
from tests.end_to_end.harness import engine_of, generate
from tests.end_to_end.reference import greedy_tokens, ragged_prompts
from tests.end_to_end.test_bytes import counted
from tests.foreign_checkpoints import FLOAT8, FORMATS, GROUP, write_foreign
from tests.tiny_models import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 8
PROMPTS = [list(text.encode()) for text in ragged_prompts(10, longest=7)]
every_format = pytest.mark.parametrize("name", FORMATS)


class Foreign:
    """A quantized checkpoint, and what its tensors stand for."""

    def __init__(self, source: Path, directory: Path, name: str) -> None:
        self.path = directory / name
        self.dense = write_foreign(source, self.path, name)
        copy = directory / f"{name}-dense"
        shutil.copytree(source, copy)
        save_file(self.dense, copy / "model.safetensors", {"format": "pt"})
        self.reference = greedy_tokens(copy, PROMPTS, NEW_TOKENS, [0])


@pytest.fixture(scope="module")
def foreign(tiny_llama_dir, tmp_path_factory) -> dict[str, Foreign]:
    """One of each format."""
    directory = tmp_path_factory.mktemp("foreign")
    return {name: Foreign(tiny_llama_dir, directory, name) for name in FORMATS}


def settings(device: str, weights: str, offload: Path, **more: Any) -> dict[str, Any]:
    batch = {"num_micro_batches": 3, "micro_batch_rows": 16, "max_rows": 48, "max_sequences": 9}
    return batch | {"device": device, "weights": weights, "offload_dir": offload} | more


def parts(directory: Path, dtype: torch.dtype = torch.float16) -> tuple[Any, Checkpoint]:
    model = build_model(load_config(directory), torch.float32, torch.device("cpu"), dtype)
    return model, Checkpoint(directory, model.module, dtype, model.stored_dtypes)


@every_format
def test_codes_stay_what_they_are(foreign, name):
    """Rows of our format stand for the same values, but for a centre's rounding to float16."""
    spec = GroupFormat(4, GROUP, "float16")
    if name in FLOAT8:
        spec = GroupFormat(8, 128, "float32")
    _, checkpoint = parts(foreign[name].path)
    assert len(checkpoint.packed) == 4 * 7
    assert set(checkpoint.packed.values()) == {spec}
    for key, rows in checkpoint.load(list(checkpoint.packed)):
        expected = foreign[name].dense[key]
        found = expand(rows, spec, expected.shape[1], torch.float32)
        if name in ("symmetric", *FLOAT8):
            assert torch.equal(found, expected)
            continue
        largest = expected.unflatten(1, (-1, GROUP)).abs().amax(-1).repeat_interleave(GROUP, 1)
        assert ((found - expected).abs() <= largest * 2**-10).all()


@every_format
@pytest.mark.parametrize(
    ("device", "weights"), [("cpu", "device=100"), ("emulated", "device=25,host=50,disk=25")]
)
def test_tokens_are_those_of_what_the_codes_stand_for(foreign, tmp_path, name, device, weights):
    """In memory and over every link, with transformers' tokens for the dense checkpoint."""
    with LLM(foreign[name].path, **settings(device, weights, tmp_path)) as llm:
        assert generate(llm, PROMPTS, NEW_TOKENS).tokens == foreign[name].reference


def test_experts_are_stacked_as_they_come(tmp_path):
    """Rows of bytes go through transformers' conversions like rows of values."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**sizes, **heads, **experts, bos_token_id=None, eos_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    mixtral = Foreign(tmp_path / "source", tmp_path, "awq")
    chosen = settings("emulated", "host=50,disk=50", tmp_path / "offload")
    with LLM(mixtral.path, **chosen) as llm:
        assert generate(llm, PROMPTS, NEW_TOKENS).tokens == mixtral.reference
        weights = {w.name: w.spec for w in engine_of(llm)._runtime.weights.store._weights}
    stacks = [spec for name, spec in weights.items() if ".experts." in name]
    assert stacks == [GroupFormat(4, GROUP, "float16")] * 4


def test_links_carry_the_checkpoints_own_bits(foreign, tmp_path):
    """Four a value, with the scales and centres of each group; the head as it is."""
    chosen = settings("cpu", "disk=100", tmp_path)
    with LLM(foreign["gptq"].path, **chosen) as llm:
        done = generate(llm, PROMPTS, 4, ignore_eos=True)
    nbytes = 0
    for key, values in foreign["gptq"].dense.items():
        if ".layers." in key and values.dim() == 2:
            nbytes += values.numel() // 2 + values.numel() // GROUP * 4
        elif ".layers." in key or key == "lm_head.weight":
            nbytes += values.numel() * 2
    assert counted(done, "weights") == {"disk->device": nbytes * len(done.plans)}


def test_what_is_not_quantized_may_be(foreign, tmp_path):
    """The head in 8 bits beside matrices that come in 4."""
    chosen = settings("cpu", "device=100", tmp_path, head_bits=8)
    with LLM(foreign["awq"].path, **chosen) as llm:
        generate(llm, PROMPTS, 2)
        weights = {w.name: w.spec for w in engine_of(llm)._runtime.weights.store._weights}
    assert weights["lm_head.weight"] == GroupFormat(8, 64, "float16")
    assert weights["model.layers.0.mlp.up_proj.weight"] == GroupFormat(4, GROUP, "float16")


@every_format
def test_plans_know_the_bytes(foreign, name):
    """From the headers alone: every tensor, and the room to expand a layer."""
    directory = foreign[name].path
    model, checkpoint = parts(directory)
    weights = find_weights(model, Quantization(), checkpoint.packed)
    disk = plan_disk(checkpoint, weights.units, directory / "offload")
    expected = model_shape(model, weights, torch.float32, disk)
    planned = shape_from_config(ModelConfig.load(directory), "float16", "float32")
    for field in ("weight_bytes", "largest_layer_bytes", "expanded_bytes", "prepared_bytes"):
        assert getattr(planned, field) == getattr(expected, field) > 0, field
    bytes_of = {tensor.name: tensor.nbytes for tensor in planned.tensors}
    assert bytes_of == {tensor.name: tensor.nbytes for tensor in expected.tensors}
    assert planned.always_prepared


def changed(source: Path, target: Path, **settings: Any) -> Path:
    """A copy with other settings of its method."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= settings
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("gptq", {"bits": 3}, "method gptq with 3 bits in groups of 32"),
        ("gptq", {"group_size": -1}, "in groups of -1"),
        ("awq", {"version": "gemv"}, "method awq, version gemv"),
        ("fp8", {"weight_block_size": [64, 64]}, "method fp8 with blocks of .64, 64. is not"),
        ("awq", {"quant_method": "bitsandbytes"}, "method bitsandbytes"),
        ("compressed", {"format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized"),
    ],
)
def test_other_formats_are_refused_by_name(foreign, tmp_path, capsys, name, other, message):
    """By the engine and by the planner, before any weight is read."""
    directory = changed(foreign[name].path, tmp_path / "model", **other)
    with pytest.raises(FlexrunError, match=message):
        parts(directory)
    with pytest.raises(FlexrunError, match=message):
        ModelConfig.load(directory)
    flags = ["--model", str(directory), "--offload-dir", str(tmp_path / "offload")]
    assert cli.main(["prepare", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("order", r"model\.layers\.1\.mlp\.up_proj\.weight .* grouped out of order"),
        ("missing", r"scales is missing"),
        ("scales", r"do not belong to 2 groups of 128 outputs"),
    ],
)
def test_broken_parts_are_named(foreign, tmp_path, change, message):
    """Which matrix, which file, and why."""
    directory = tmp_path / "model"
    shutil.copytree(foreign["gptq"].path, directory)
    tensors = load_file(directory / "model.safetensors")
    module = "model.layers.1.mlp.up_proj"
    if change == "order":
        tensors[f"{module}.g_idx"] = tensors[f"{module}.g_idx"].flip(0).contiguous()
    elif change == "missing":
        del tensors[f"{module}.scales"]
    else:
        tensors[f"{module}.scales"] = tensors[f"{module}.scales"][:1].contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(FlexrunError, match=message):
        LLM(directory, **settings("cpu", "device=100", tmp_path / "offload"))
    left = list((tmp_path / "offload").rglob("weights.bin"))
    assert left == []
