"""Directories, GGUF files and hub names become checkpoint directories, or a clear error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexrun.errors import UsageError
from flexrun.model_files import resolve_model
from policy_search.machine import cache_dir

ROOT = Path(__file__).resolve().parents[2]

# A stand-in for the conversion, so that the processes below need not import torch.
CHILD = """
import sys, time, types
from pathlib import Path

def convert_gguf(path, directory):
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    with open(sys.argv[2], "a") as log:
        log.write("started\\n")
    time.sleep(float(sys.argv[3]))
    (directory / "model.safetensors").write_text("whole")

sys.modules["flexrun.gguf_file"] = types.SimpleNamespace(convert_gguf=convert_gguf)
from flexrun.model_files import resolve_model
print(resolve_model(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def some_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF, or so it says")
    return path


def start_child(gguf: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(gguf), str(log), str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_directory_is_taken_as_it_is(tiny_llama_dir: Path):
    """A directory with a config.json is the checkpoint directory."""
    assert resolve_model(tiny_llama_dir) == tiny_llama_dir
    assert resolve_model(str(tiny_llama_dir)) == tiny_llama_dir


def test_home_directory_is_expanded(tiny_llama_dir: Path, monkeypatch):
    """`~` stands for the user's home."""
    monkeypatch.setenv("HOME", str(tiny_llama_dir.parent))
    assert resolve_model(f"~/{tiny_llama_dir.name}") == tiny_llama_dir


def test_directory_without_config_is_refused(tmp_path: Path):
    """A directory without config.json is no checkpoint; one with a GGUF file says so."""
    with pytest.raises(UsageError, match=r"has no config\.json"):
        resolve_model(tmp_path)
    (tmp_path / "some.gguf").touch()
    with pytest.raises(UsageError, match=r"give the GGUF file itself: .*some\.gguf"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_corrupt_config_is_refused(text: str, tmp_path: Path):
    """A config.json that is not a JSON object is refused by path."""
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=r"cannot read .*config\.json"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/dir", "nowhere", "a/b/c", "model.gguf"])
def test_path_that_is_not_there_is_refused(name: str):
    """What is neither a path nor a hub name is refused, naming the three possibilities."""
    with pytest.raises(UsageError, match="there is no model at") as caught:
        resolve_model(name)
    assert "org/name" in str(caught.value)


def test_file_of_another_kind_is_refused(tmp_path: Path):
    """A weights file is refused in favour of its directory."""
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(UsageError, match="give the directory"):
        resolve_model(path)


def test_hub_name_that_cannot_be_downloaded_is_refused():
    """Without a network, a hub model that was not downloaded before is refused."""
    with pytest.raises(UsageError, match="downloading nobody/nothing from the Hugging Face Hub"):
        resolve_model("nobody/nothing")


def test_hub_name_is_downloaded_without_other_formats(monkeypatch, tiny_llama_dir: Path):
    """A hub name is resolved by the hub's library, restricted to the files that are used."""
    import huggingface_hub

    asked: dict[str, list[str]] = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tiny_llama_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/name-1.5_b") == tiny_llama_dir
    assert "model*.safetensors" in asked["org/name-1.5_b"]
    assert not {"*", "*.bin", "*.py", "*.safetensors"} & set(asked["org/name-1.5_b"])


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path: Path):
    """$FLEXRUN_CACHE comes first, then $XDG_CACHE_HOME/flexrun, then ~/.cache/flexrun."""
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FLEXRUN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "flexrun"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "flexrun"


def test_cache_that_cannot_be_written_is_refused(some_gguf: Path, monkeypatch, tmp_path: Path):
    """A cache directory that cannot be made is refused with the variable to set."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set FLEXRUN_CACHE"):
        resolve_model(some_gguf)


def test_another_file_of_the_same_name_is_converted_anew(some_gguf: Path, tmp_path: Path):
    """The cache tells files apart by content, not by name."""
    first = start_child(some_gguf, tmp_path / "log", 0).communicate()[0]
    some_gguf.write_bytes(b"GGUF, another one!!")
    assert start_child(some_gguf, tmp_path / "log", 0).communicate()[0] != first


def test_two_processes_convert_once(some_gguf: Path, tmp_path: Path, cache: Path):
    """Of two processes at once one converts, the other waits; both get the whole result."""
    log = tmp_path / "log"
    children = [start_child(some_gguf, log, 0.5) for _ in range(2)]
    results = {child.communicate()[0] for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert len(results) == 1
    directory = Path(results.pop().strip())
    assert (directory / "model.safetensors").read_text() == "whole"
    assert log.read_text() == "started\n"
    assert sorted(path.name for path in (cache / "models").iterdir()) == [
        directory.name,
        f"{directory.name}.lock",
    ]


def test_killed_conversion_is_not_trusted(some_gguf: Path, tmp_path: Path, cache: Path):
    """After a kill in the middle, the next call starts anew and removes the remains."""
    log = tmp_path / "log"
    child = start_child(some_gguf, log, 60)
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    remains = [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert len(remains) == 1
    second = start_child(some_gguf, log, 0)
    directory = Path(second.communicate()[0].strip())
    assert (directory / "model.safetensors").read_text() == "whole"
    assert not remains[0].exists()
