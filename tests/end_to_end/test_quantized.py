"""Weights in groups of 4 or 8 bits: the tokens of the expanded weights, and bytes to the byte."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from compression import groupwise
from compression.expansion import quantize
from compression.spec import GroupFormat
from flexrun import LLM, cli
from flexrun.errors import CapacityError, UsageError
from offload.placement import TensorSpec
from offload.prepared_layout import FOLDER
from offload.tiers import Split, Tier
from policy_search.__main__ import main as plan_command
from policy_search.errors import PolicyError
from policy_search.policy import Policy
from tests.end_to_end.harness import SPLITS, engine_of, generate, run_to_the_end
from tests.end_to_end.reference import greedy_tokens, ragged_prompts
from tests.end_to_end.test_bytes import counted, placeable, streamed_bytes
from tests.tiny_models import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 8
PROMPTS = [list(text.encode()) for text in ragged_prompts(14, longest=7)]
DEVICES = ("cpu", "emulated")
LEAST = 4096
"""Values of a matrix that is quantized."""


def expanded_copy(source: Path, target: Path, layers: int, head: int, keep: str = "-") -> Path:
    """The checkpoint with what is quantized rounded to what its codes stand for, in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, values in model.named_parameters():
        bits = layers if ".layers." in name else head
        if values.dim() < 2 or values.numel() < LEAST or bits == 16 or keep in name:
            continue
        spec, columns = GroupFormat(bits, 64), values.shape[-1]
        rows = values.detach().reshape(-1, columns)
        expanded = groupwise.expand(quantize(rows, spec), spec, columns, torch.float32)
        assert not torch.equal(expanded, rows)
        values.data.copy_(expanded.view(values.shape))
    model.save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    return target


def settings(device: str, weights: str, offload: Path, **more: Any) -> dict[str, Any]:
    batch = {"num_micro_batches": 3, "micro_batch_rows": 16, "max_rows": 48, "max_sequences": 9}
    where = {"device": device, "weights": weights, "offload_dir": offload, "dtype": "float32"}
    return batch | where | {"kv_cache": "device=100"} | more


@pytest.fixture(scope="module")
def reference(tiny_llama_dir, tmp_path_factory) -> list[list[int]]:
    """What transformers generates from the expanded weights, layers in 4 bits, the head in 8.

    The plain weights have other tokens.
    """
    copy = expanded_copy(tiny_llama_dir, tmp_path_factory.mktemp("expanded"), 4, 8)
    tokens = greedy_tokens(copy, PROMPTS, NEW_TOKENS, [0])
    assert tokens != greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])
    return tokens


@pytest.fixture(scope="module")
def offload(tmp_path_factory) -> Path:
    """One offload directory for many runs: the store is written once."""
    return tmp_path_factory.mktemp("offload")


@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_those_of_the_expanded_weights(
    tiny_llama_dir, reference, offload, device, weights
):
    """Wherever the packed weights live."""
    chosen = settings(device, weights, offload, weight_bits=4, head_bits=8)
    with LLM(tiny_llama_dir, **chosen) as llm:
        done = generate(llm, PROMPTS, NEW_TOKENS)
    assert done.tokens == reference
    assert max(done.micro_batches) >= 3


@pytest.mark.parametrize("device", DEVICES)
def test_experts_are_quantized_and_their_router_is_not(tmp_path, device):
    """Stacks of matrices that each row visits two of."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.15}
    config = MixtralConfig(**sizes, **heads, **experts, bos_token_id=None, eos_token_id=0)
    torch.manual_seed(3)
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    copy = expanded_copy(source, tmp_path / "copy", 4, 16)
    expected = greedy_tokens(copy, PROMPTS, NEW_TOKENS, [0])
    chosen = settings(device, "host=50,disk=50", tmp_path / "offload", weight_bits=4)
    with LLM(source, **chosen) as llm:
        assert generate(llm, PROMPTS, NEW_TOKENS).tokens == expected
        weights = {w.name: w for w in engine_of(llm)._runtime.weights.store._weights}
    stacks = [w for name, w in weights.items() if ".experts." in name]
    assert len(stacks) == 4
    assert all(w.spec == GroupFormat(4, 64) for w in stacks)
    routers = [w for w in weights.values() if w.shape == (4, 64)]
    assert [w.spec for w in routers] == [None, None]


def packed(specs: list[TensorSpec], columns: dict[str, int], layers: int) -> list[TensorSpec]:
    """The same tensors in bytes of 4 bits for those of layers, 8 for head and table."""
    result = []
    for spec in specs:
        values, last = spec.nbytes // 4, columns[spec.name]
        bits = 4 if 0 <= spec.unit < layers else 8
        if values >= LEAST:
            row = last * bits // 8 + 4 * (last // 64)
            spec = replace(spec, nbytes=values // last * row)
        result.append(spec)
    return result


@cache
def columns_of(directory: Path) -> dict[str, int]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return {name: values.shape[-1] for name, values in model.named_parameters()}


@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_tied_llama_dir"])
def test_links_carry_packed_bytes(request, tmp_path_factory, model, device, weights):
    """Once a sweep, and tiers hold them; both to the byte."""
    directory = request.getfixturevalue(model)
    offload = tmp_path_factory.getbasetemp() / f"packed-{model}"
    chosen = settings(device, weights, offload, weight_bits=4, head_bits=8)
    specs = packed(placeable(directory, 4), columns_of(directory), 4)
    with LLM(directory, **chosen) as llm:
        done = generate(llm, PROMPTS, 4, ignore_eos=True)
        placed = engine_of(llm)._runtime.weights.placed
    expected = streamed_bytes(specs, weights, device)
    sweeps = len(done.plans)
    assert counted(done, "weights") == {link: n * sweeps for link, n in expected.items()}
    norm = 64 * 4
    assert sum(placed.values()) == sum(spec.nbytes for spec in specs) + norm
    if Split.parse(weights).fraction(Tier.DISK) == 1:
        assert placed[Tier.DISK] == sum(spec.nbytes for spec in specs)


@pytest.mark.parametrize("weights", ["device=100", "disk=100"])
def test_without_quantization_nothing_changes(tiny_llama_dir, tmp_path, weights):
    """16 bits, said or unsaid, are the same tokens and bytes, and nothing is prepared."""
    chosen = settings("cpu", weights, tmp_path)
    runs = [
        run_to_the_end(tiny_llama_dir, PROMPTS, 4, **chosen, **more)
        for more in ({}, {"weight_bits": 16, "head_bits": 16, "group_size": 32, "keep": "proj"})
    ]
    assert runs[0].tokens == runs[1].tokens
    kinds = [run.summary["bytes_by_kind"] for run in runs]
    assert kinds[0] == kinds[1]
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_stays_as_it_is(tiny_llama_dir, tmp_path):
    """`keep` is searched in names; a store of other choices is another one."""
    chosen = settings("cpu", "disk=100", tmp_path / "offload", weight_bits=4)
    tokens = {}
    for keep in ("", "down_proj"):
        copy = expanded_copy(tiny_llama_dir, tmp_path / f"copy{keep}", 4, 16, keep or "-")
        with LLM(tiny_llama_dir, **chosen, keep=keep) as llm:
            tokens[keep] = generate(llm, PROMPTS, NEW_TOKENS).tokens
        assert tokens[keep] == greedy_tokens(copy, PROMPTS, NEW_TOKENS, [0])
    assert tokens[""] != tokens["down_proj"]
    stores = [path for path in (tmp_path / "offload" / FOLDER).iterdir() if path.is_dir()]
    assert len(stores) == 2


def test_a_name_that_is_nowhere_is_refused(tiny_llama_dir, tmp_path):
    """A slip in `keep` would quantize what should stay as it is."""
    chosen = settings("cpu", "device=100", tmp_path, weight_bits=4)
    with pytest.raises(UsageError, match=r"'dwon_proj' is found in no tensor's name"):
        LLM(tiny_llama_dir, **chosen, keep="dwon_proj")
    assert list(tmp_path.iterdir()) == []


class Commands:
    """Runs commands in this process on one model."""

    def __init__(self, model: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.flags = ["--model", str(model), "--offload-dir", str(directory / "offload")]
        self.input, self.output = directory / "prompts.jsonl", directory / "results.jsonl"
        lines = [json.dumps({"prompt_token_ids": prompt}) for prompt in PROMPTS]
        self.input.write_text("\n".join(lines) + "\n")
        self._capsys = capsys
        self.stdout = self.stderr = ""

    def __call__(self, command: str, *more: str) -> int:
        code = cli.main([command, *self.flags, *more])
        self.stdout, self.stderr = self._capsys.readouterr()
        return code

    def generate(self, *more: str) -> int:
        files = ["--input", str(self.input), "--output", str(self.output)]
        machine = ["--device", "cpu", "--dtype", "float32", "--max-tokens", str(NEW_TOKENS)]
        return self("generate", *files, *machine, *more)

    def tokens(self) -> list[list[int]]:
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        return [each["token_ids"] for each in sorted(lines, key=lambda each: each["index"])]


@pytest.fixture
def commands(tiny_llama_dir, tmp_path, capsys) -> Commands:
    return Commands(tiny_llama_dir, tmp_path, capsys)


def test_the_command_line_prepares_plans_and_generates(commands, reference, tmp_path):
    """A plan with bits, the store it needs, and a job under it, which says what is quantized."""
    bits = ["--weight-bits", "4", "--head-bits", "8"]
    plan = tmp_path / "plan.json"
    model = commands.flags[:2]
    assert plan_command([*model, *bits, "--unified", "--dtype", "float32", "-o", str(plan)]) == 0
    policy = json.loads(plan.read_text())
    assert (policy["weight_bits"], policy["head_bits"]) == (4, 8)
    assert commands("prepare", *bits, "--dtype", "float32") == 0
    assert "prepared in" in commands.stdout
    assert commands.generate("--policy", str(plan)) == 0
    assert "in 4 bits, head in 8" in commands.stderr
    assert commands.tokens() == reference


def test_a_job_is_not_continued_with_other_bits(commands):
    """The file that remembers the job names what differs; nothing is lost."""
    assert commands.generate("--weight-bits", "4") == 0
    before = commands.output.read_bytes()
    for more in ([], ["--weight-bits", "8"], ["--weight-bits", "4", "--keep", "down_proj"]):
        assert commands.generate(*more) == 2
        assert "--weight-bits" in commands.stderr or "--keep" in commands.stderr
    assert commands.output.read_bytes() == before
    assert commands.generate("--weight-bits", "4") == 0


@pytest.mark.parametrize("bits", [4.0, "4", 3, True])
def test_bits_that_are_none_are_refused(tiny_llama_dir, tmp_path, bits):
    """As a setting, and in a policy's file."""
    with pytest.raises(UsageError, match="weight_bits must be one of 16, 8, 4"):
        LLM(tiny_llama_dir, weight_bits=bits)
    with pytest.raises(PolicyError, match="weight_bits must be one of 16, 8, 4"):
        Policy.from_json(json.dumps({"weight_bits": bits}))


def test_a_disk_that_is_too_small_is_named(tiny_llama_dir, tmp_path):
    """The store takes its bytes wherever weights live, so only more disk helps."""
    chosen = settings("cpu", "device=100", tmp_path, weight_bits=4, disk_space=10_000)
    del chosen["kv_cache"]  # so that there is a plan to be made
    with pytest.raises(CapacityError, match="the prepared store of quantized weights") as caught:
        LLM(tiny_llama_dir, **chosen)
    assert "--device-memory" not in str(caught.value.hint)


def test_values_that_are_no_numbers_are_named(tiny_llama_dir, tmp_path, capsys):
    """The tensor, and what to do about it; the command's exit code is that of wrong input."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    byte_tokenizer().save_pretrained(tmp_path / "bad")
    flags = ["--model", str(tmp_path / "bad"), "--offload-dir", str(tmp_path / "offload")]
    assert cli.main(["prepare", *flags, "--weight-bits", "4"]) == 2
    message = capsys.readouterr().err
    assert "model.layers.2.mlp.up_proj.weight cannot be quantized" in message
    assert "--keep" in message
    assert cli.main(["prepare", *flags, "--weight-bits", "4", "--keep", "2.mlp.up_proj"]) == 0
