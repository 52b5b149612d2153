"""gpt-oss in MXFP4: its own codes on every link, turned by nobody, and transformers' tokens."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.groupwise import expand
from compression.selection import Quantization
from compression.spec import GroupFormat
from flexrun import LLM, cli
from flexrun.disk_weights import plan_disk
from flexrun.errors import FlexrunError
from flexrun.loading import model_shape
from flexrun.model import load_config, stored_type
from flexrun.model_weights import find_weights
from offload.tiers import CACHE_LINE, padded
from policy_search.model_config import ModelConfig
from policy_search.shape_from_config import shape_from_config
from tests.end_to_end.harness import engine_of, generate
from tests.end_to_end.reference import greedy_tokens
from tests.end_to_end.test_bytes import counted
from tests.end_to_end.test_prequantized import NEW_TOKENS, PROMPTS, parts, settings
from tests.mxfp4_checkpoints import LAYERS, write_mxfp4

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = GroupFormat(4, 32, "e8m0")
ROUTED = "model.layers.1.mlp.experts.down_proj"


@dataclass(frozen=True)
class Mxfp4:
    """A checkpoint, what its tensors stand for, and the tokens of that."""

    path: Path
    dense: dict[str, torch.Tensor]
    reference: list[list[int]]


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory) -> Mxfp4:
    """Two layers of four experts."""
    directory = tmp_path_factory.mktemp("mxfp4")
    dense = write_mxfp4(directory / "model", directory / "dense")
    reference = greedy_tokens(directory / "dense", PROMPTS, NEW_TOKENS, [0])
    return Mxfp4(directory / "model", dense, reference)


def test_codes_stay_what_they_are(mxfp4):
    """Rows stand for exactly what transformers makes of the checkpoint, turned."""
    _, checkpoint = parts(mxfp4.path)
    assert checkpoint.unexpected == ()
    assert len(checkpoint.packed) == 2 * LAYERS
    assert set(checkpoint.packed.values()) == {SPEC}
    for key, rows in checkpoint.load(list(checkpoint.packed)):
        expected = mxfp4.dense[key].transpose(1, 2)
        assert rows.numel() == expected.numel() * 17 // 32
        found = expand(rows.flatten(0, 1), SPEC, expected.shape[-1], torch.float32)
        assert torch.equal(found.view(expected.shape), expected)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("weights", ["device=100", "host=100", "disk=100", "host=50,disk=50"])
def test_tokens_are_those_of_what_the_codes_stand_for(mxfp4, tmp_path, device, weights):
    """From every tier, over every link."""
    with LLM(mxfp4.path, **settings(device, weights, tmp_path)) as llm:
        assert generate(llm, PROMPTS, NEW_TOKENS).tokens == mxfp4.reference


@pytest.mark.parametrize(
    ("device", "weights", "links"),
    [
        ("cpu", "disk=100", ["disk->device"]),
        ("emulated", "host=100", ["host->device"]),
        ("emulated", "disk=100", ["disk->host", "host->device"]),
    ],
)
def test_links_carry_the_checkpoints_own_bits(mxfp4, tmp_path, device, weights, links):
    """4.25 a value of the experts: 16 bytes of codes and a scale for 32; norms in float32."""
    with LLM(mxfp4.path, **settings(device, weights, tmp_path)) as llm:
        done = generate(llm, PROMPTS, 4, ignore_eos=True)
    sizes = []
    for key, values in mxfp4.dense.items():
        if values.dim() == 3:
            sizes.append(values.numel() // 32 * 17)
        elif ".layers." in key or key == "lm_head.weight":
            sizes.append(values.numel() * (4 if "norm" in key else 2))
    if weights == "host=100":  # a layer's weights are one copy, and begin at cache lines
        sizes = [padded(size, CACHE_LINE) for size in sizes]
    nbytes = sum(sizes)
    assert counted(done, "weights") == dict.fromkeys(links, nbytes * len(done.plans))


def test_what_is_not_quantized_may_be(mxfp4, tmp_path):
    """Attention in 4 bits of ours beside experts that come in 4; the router stays as it is."""
    chosen = settings("cpu", "device=100", tmp_path, weight_bits=4)
    with LLM(mxfp4.path, **chosen) as llm:
        generate(llm, PROMPTS, 2)
        weights = {w.name: w.spec for w in engine_of(llm)._runtime.weights.store._weights}
    assert weights["model.layers.0.mlp.experts.gate_up_proj"] == SPEC
    assert weights["model.layers.0.mlp.experts.gate_up_proj_bias"] is None
    assert weights["model.layers.0.mlp.router.weight"] is None
    assert weights["model.layers.0.self_attn.q_proj.weight"] == GroupFormat(4, 64, "float16")
    directory = mxfp4.path
    planned = shape_from_config(ModelConfig.load(directory), "float16", "float32", chosen_bits())
    model, checkpoint = parts(directory)
    found = find_weights(model, chosen_bits(), checkpoint.packed)
    assert planned.weight_bytes == sum(weight.nbytes for weight in found.all)


def chosen_bits() -> Quantization:
    """What `--weight-bits 4` means."""
    return Quantization(weight_bits=4)


@pytest.mark.parametrize("headers", [True, False])
def test_plans_know_the_bytes(mxfp4, tmp_path, headers):
    """From headers or from config.json alone: every tensor, and the room to expand a layer."""
    directory = mxfp4.path
    model, checkpoint = parts(directory)
    weights = find_weights(model, Quantization(), checkpoint.packed)
    expected = model_shape(
        model, weights, torch.float32, plan_disk(checkpoint, weights.units, tmp_path)
    )
    if not headers:
        directory = tmp_path / "config"
        directory.mkdir()
        shutil.copy(mxfp4.path / "config.json", directory)
    planned = shape_from_config(ModelConfig.load(directory), "float16", "float32")
    for field in (
        *("weight_bytes", "largest_layer_bytes", "expanded_bytes", "expanded_in_sweep"),
        *("prepared_bytes", "widest", "flops_per_row", "always_prepared"),
    ):
        assert getattr(planned, field) == getattr(expected, field) > 0, field
    if headers:
        bytes_of = {tensor.name: tensor.nbytes for tensor in planned.tensors}
        assert bytes_of == {tensor.name: tensor.nbytes for tensor in expected.tensors}


def changed(source: Path, target: Path, tensors: dict[str, torch.Tensor | None], **config) -> Path:
    """A copy with other tensors, None for none, and other settings."""
    shutil.copytree(source, target)
    stored = load_file(target / "model.safetensors") | tensors
    kept = {key: tensor.contiguous() for key, tensor in stored.items() if tensor is not None}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    known = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(known))
    return target


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("_scales", lambda _: None, "cannot be used: scales is missing"),
        ("_blocks", lambda _: None, f"lacks 1 of .* {ROUTED}"),
        ("_scales", lambda s: s[:, 1:], r"scales of \(4, 63, 3\) do not belong to .*64, 3, 16"),
        ("_scales", lambda s: s.masked_fill(s == s[0, 0, 0], 255), "scales are not numbers"),
        ("_scales", lambda s: s.float(), "scales of type torch.float32 are not supported"),
        (
            "_blocks",
            lambda b: b[..., :8],
            r"cannot be used: its codes have the shape \(4, 64, 3, 8",
        ),
        (
            "_blocks",
            lambda b: b[:, :, :2],
            r"must have the shape \(4, 64, 51\) but has \(4, 64, 34",
        ),
    ],
)
def test_broken_parts_are_named(mxfp4, tmp_path, part, change, message):
    """Which matrix, which file, and why; nothing is left on the disk."""
    tensor = load_file(mxfp4.path / "model.safetensors")[ROUTED + part]
    directory = changed(mxfp4.path, tmp_path / "model", {ROUTED + part: change(tensor)})
    with pytest.raises(FlexrunError, match=message) as error:
        LLM(directory, **settings("cpu", "device=100", tmp_path / "offload"))
    assert ROUTED in error.value.message
    assert error.value.hint
    assert list((tmp_path / "offload").rglob("weights.bin")) == []


def test_parts_of_groups_are_refused(mxfp4, tmp_path, capsys):
    """By the engine, from the headers and from config.json alone."""
    directory = changed(mxfp4.path, tmp_path / "model", {}, intermediate_size=100)
    message = r"model\.layers\.\d\.mlp\.experts\.down_proj has 100 inputs, which is no whole"
    offload = tmp_path / "offload"
    assert cli.main(["prepare", "--model", str(directory), "--offload-dir", str(offload)]) == 2
    assert re.search(message, capsys.readouterr().err)
    (directory / "model.safetensors").unlink()
    with pytest.raises(FlexrunError, match=message):
        shape_from_config(ModelConfig.load(directory), "float16")


def test_a_type_that_is_not_named_is_bfloat16(mxfp4, tmp_path):
    """As in OpenAI's own config.json; elsewhere it is float32."""
    directory = changed(mxfp4.path, tmp_path / "model", {}, dtype=None)
    assert stored_type(directory, load_config(directory)) == torch.bfloat16
    assert ModelConfig.load(directory).types("auto", unified=False) == ("bfloat16", "bfloat16")
