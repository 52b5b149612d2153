"""Facts about `flexrun prepare`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flexrun import cli
from flexrun.errors import UnsupportedModelError
from offload.prepared import find_prepared
from offload.prepared_layout import FOLDER


class Command:
    """Runs `flexrun prepare` in this process, with the directory `offload`."""

    def __init__(self, model: Path, offload: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.offload = model, offload
        self.stdout = self.stderr = ""
        self._capsys = capsys

    def __call__(self, *more: str) -> int:
        flags = ["--model", str(self.model), "--offload-dir", str(self.offload)]
        code = cli.main(["prepare", *flags, *more])
        self.stdout, self.stderr = self._capsys.readouterr()
        return code

    @property
    def stores(self) -> list[Path]:
        return sorted(path for path in (self.offload / FOLDER).glob("*") if path.is_dir())


@pytest.fixture
def command(tiny_llama_dir, tmp_path, capsys, monkeypatch) -> Command:
    # The verdict about the architecture has tests of its own.
    monkeypatch.setattr("flexrun.prepare.ensure_exact", lambda config: None)
    return Command(tiny_llama_dir, tmp_path / "offload", capsys)


def test_weights_are_prepared_once(command):
    """The first run writes and says where and how much; the second finds it already prepared."""
    assert command("--dtype", "bfloat16") == 0
    (store,) = command.stores
    assert command.stdout.startswith("prepared in ")
    assert str(store) in command.stdout
    assert "KiB" in command.stdout
    files = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    assert command("--dtype", "bfloat16") == 0
    assert command.stdout.startswith(f"already prepared: {store} (")
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == files


def test_all_weights_are_there_in_the_order_of_a_sweep(command):
    """Every tensor of the checkpoint is stored, cast, layer after layer."""
    assert command("--dtype", "bfloat16") == 0
    store = find_prepared(command.offload, command.stores[0].name)
    assert store is not None
    expected = load_file(command.model / "model.safetensors")
    for name, tensor in expected.items():
        extent = store.extent(name)
        target = torch.empty(extent.nbytes, dtype=torch.uint8)
        extent.read_into(target)
        assert torch.equal(target.view(torch.bfloat16).view(tensor.shape), tensor.bfloat16()), name
    layers = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(4)]
    order = ["model.norm.weight", "model.embed_tokens.weight", *layers, "lm_head.weight"]
    places = [store.extent(name).offset for name in order]
    assert places == sorted(places)
    store.close()


def test_a_checkpoint_that_is_read_in_place_is_not_copied(command):
    """Weights stored as they are used need no copy."""
    assert command() == 0
    assert "nothing to prepare" in command.stdout
    assert str(command.model) in command.stdout
    assert command.stores == []


def test_a_tied_table_is_stored_once(command, tiny_tied_llama_dir):
    """A model with one matrix for embedding and head is prepared, too."""
    command.model = tiny_tied_llama_dir
    assert command("--dtype", "bfloat16") == 0
    assert len(command.stores) == 1


def test_another_type_is_another_store(command):
    """Each type has its own copy, beside the other."""
    assert command("--dtype", "bfloat16") == 0
    assert command("--dtype", "float16") == 0
    assert command.stdout.startswith("prepared in ")
    assert len(command.stores) == 2


def test_a_budget_that_is_too_small_is_refused_before_writing(command):
    """What exceeds --disk-space is refused with the missing bytes; nothing is created."""
    assert command("--dtype", "bfloat16", "--disk-space", "100KiB") == 2
    assert "is missing in the budget of 100.00 KiB" in command.stderr
    assert "--disk-space" in command.stderr
    assert not command.offload.exists()
    assert command("--dtype", "bfloat16", "--disk-space", "1GiB") == 0


def test_a_full_disk_is_refused_before_writing(command, monkeypatch):
    """What exceeds the free space is refused; only the lock file is left."""
    usage = os.statvfs(command.model)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: type("Usage", (), {"free": usage.f_bsize})()
    )
    assert command("--dtype", "bfloat16") == 2
    assert "is missing" in command.stderr
    assert "--offload-dir" in command.stderr
    assert command.stores == []


def test_a_damaged_store_is_an_error(command):
    """A store that cannot be trusted is not called prepared; the message says what to delete."""
    assert command("--dtype", "bfloat16") == 0
    (store,) = command.stores
    os.truncate(store / "weights.bin", 4096)
    assert command("--dtype", "bfloat16") == 2
    assert f"delete {store}" in command.stderr


def test_a_model_that_cannot_be_run_is_not_prepared(command, monkeypatch):
    """An architecture that is refused costs no disk space."""

    def refuse(config):
        raise UnsupportedModelError("it cannot be run exactly")

    monkeypatch.setattr("flexrun.prepare.ensure_exact", refuse)
    assert command("--dtype", "bfloat16") == 2
    assert "cannot be run exactly" in command.stderr
    assert not command.offload.exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--disk-space", "much"],
        ["--dtype", "int3"],
        ["--weights", "disk=100"],
        ["--kv-bits", "4"],
    ],
)
def test_wrong_usage_is_explained(command, flags):
    """Values that cannot be read and flags of other subcommands end with exit code 2."""
    assert command(*flags) == 2
    assert flags[0] in command.stderr
    assert not command.offload.exists()


def test_the_model_must_be_there(command, tmp_path):
    """A model that does not exist is an error of usage."""
    command.model = tmp_path / "nowhere"
    assert command() == 2
    assert "there is no model at" in command.stderr
