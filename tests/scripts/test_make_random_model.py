"""The random checkpoints that speed is measured with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.scripts.in_process import run_here

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_random_model.py"


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here(SCRIPT, "tiny", str(directory), *arguments)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by a process of its own."""
    directory = tmp_path_factory.mktemp("random") / "tiny"
    command = [sys.executable, str(SCRIPT), "tiny", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{directory}\n"
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def test_transformers_runs_it_to_any_length(tiny_dir: Path):
    """transformers loads every tensor in bfloat16 and generates as many tokens as are asked for."""
    model, info = AutoModelForCausalLM.from_pretrained(tiny_dir, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert GenerationConfig.from_pretrained(tiny_dir).eos_token_id is None
    ids = torch.arange(10).view(2, 5)
    output = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert output.shape == (2, 25)


def test_weights_have_the_initializer_range(tiny_dir: Path):
    """Matrices are normal with a deviation of 0.02, norms are one, no two matrices are alike."""
    matrices = []
    for name, tensor in weights(tiny_dir).items():
        if "norm" in name:
            assert (tensor == 1).all(), name
            continue
        assert tensor.float().std().item() == pytest.approx(0.02, rel=0.02), name
        assert tensor.float().mean().abs().item() < 1e-3, name
        matrices.append(tensor.flatten()[:1000])
    assert len(torch.stack(matrices).unique(dim=0)) == len(matrices)


def test_same_seed_gives_same_bytes_and_another_seed_others(tiny_dir: Path, tmp_path: Path):
    """The seed decides about every byte."""
    for name, seed in (("again", "0"), ("other", "1")):
        done = make(tmp_path / name, "--seed", seed)
        assert done.returncode == 0, done.stderr
    shard = "model-00001-of-00001.safetensors"
    first = (tiny_dir / shard).read_bytes()
    assert (tmp_path / "again" / shard).read_bytes() == first
    assert (tmp_path / "other" / shard).read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_second_run_changes_nothing(tiny_dir: Path):
    """A model that is there is left alone."""
    before = {path: path.stat().st_mtime_ns for path in tiny_dir.iterdir()}
    done = make(tiny_dir)
    assert done.returncode == 0
    assert "already there" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in tiny_dir.iterdir()} == before


def test_another_model_in_the_way_is_an_error(tiny_dir: Path):
    """A directory with anything else is not overwritten, and the error says what to do."""
    done = make(tiny_dir, "--seed", "7")
    assert done.returncode == 1
    assert "hint: name another directory" in done.stderr


def test_tokenizer_and_type_are_taken_over(tiny_llama_dir: Path, tmp_path: Path):
    """A tokenizer is copied beside weights of the type asked for."""
    directory = tmp_path / "model"
    done = make(directory, "--tokenizer", str(tiny_llama_dir), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    copied = (directory / "tokenizer.json").read_bytes()
    assert copied == (tiny_llama_dir / "tokenizer.json").read_bytes()
    assert {tensor.dtype for tensor in weights(directory).values()} == {torch.float32}
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights(directory))
