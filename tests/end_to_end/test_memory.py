"""The process stays as small as promised, and leaves no threads, descriptors, files or memory."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from flexrun import LLM, CapacityError, CheckpointError, SamplingParams
from offload.errors import OffloadStoreError
from offload.offload_file import OffloadFile
from tests.end_to_end.harness import engine_of, generate
from tests.end_to_end.reference import ragged_prompts

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
OVERHEAD = 192 * MIB
"""Most resident memory beside weights that stay in RAM, counted from the imports on.

Working memory takes 72 MiB of it: one slot for the output head (54 MiB), two of 7 MiB for layers,
KV pages of 8 prompts. The rest is the tokenizer, the model's modules, what torch and transformers
import on first use, activations, and what the allocator keeps: 70 to 90 MiB where it was measured.
"""

# Prints memory right after the imports, then at its peak.
CHILD = """
import json, sys
import torch, transformers, transformers.models.llama.modeling_llama
from flexrun import LLM, SamplingParams
import flexrun.engine

def memory(field):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[field].split()[0]) * 1024

before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
model, weights = sys.argv[1:]
with LLM(model, device="cpu", dtype="bfloat16", weights=weights, kv_cache="device=100") as llm:
    prompts = [f"{i}: The river" + " runs" * i for i in range(8)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    sizes = {"weights": llm._engine._runtime.shape.weight_bytes}
tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
print(json.dumps(sizes | {"growth": memory("VmHWM") - before, "tokens": tokens}))
"""


def measure(model: Path, weights: str) -> dict[str, int]:
    """Bytes of a child process that runs 8 prompts."""
    command = [sys.executable, "-c", CHILD, str(model), weights]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_weights_on_disk_are_not_in_memory(smollm2_dir):
    """With all weights on DISK the process grows by less than the model, at load and at work."""
    found = measure(smollm2_dir, "disk=100")
    assert found["tokens"] > 64
    assert found["weights"] > OVERHEAD
    assert found["growth"] < OVERHEAD


def test_weights_in_memory_are_there_once(smollm2_dir):
    """With all weights in RAM the process grows by the model's bytes once, and the overhead."""
    found = measure(smollm2_dir, "device=100")
    assert found["weights"] < found["growth"] < found["weights"] + OVERHEAD


class Traces:
    """What a process can leave behind, compared with how it was before."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.threads = set(threading.enumerate())
        self.descriptors = self.open_files()

    @staticmethod
    def open_files() -> dict[str, str]:
        found = {}
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
                found[name] = os.readlink(f"/proc/self/fd/{name}")
        return found

    def assert_gone(self) -> None:
        assert set(threading.enumerate()) - self.threads == set()
        assert self.open_files() == self.descriptors
        assert list(self.directory.iterdir()) == []


@pytest.fixture
def traces(tmp_path, one_thread, tiny_llama_dir) -> Traces:
    """Taken after a first run, which opens what the process keeps for good."""
    (tmp_path / "offload").mkdir()
    prompts = [[1, 2, 3]]
    with LLM(tiny_llama_dir, **settings("cpu", tmp_path / "offload")) as llm:
        generate(llm, prompts, 1)
    return Traces(tmp_path / "offload")


def settings(device: str, directory: Path) -> dict[str, Any]:
    return {
        "device": device,
        "dtype": "float32",
        "weights": "device=25,host=25,disk=50",
        "kv_cache": "device=50,host=50",
        "num_micro_batches": 3,
        "max_rows": 48,
        "micro_batch_rows": 16,
        "max_sequences": 12,
        "offload_dir": directory,
    }


PROMPTS = [list(text.encode()) for text in ragged_prompts(12, longest=7)]
both_devices = pytest.mark.parametrize("device", ["cpu", "emulated"])


@both_devices
def test_a_run_shows_its_traces(tiny_llama_dir, traces, device):
    """A running engine has a thread per link and one unnamed offload file."""
    with LLM(tiny_llama_dir, **settings(device, traces.directory)):
        names = {thread.name for thread in set(threading.enumerate()) - traces.threads}
        expected = {"flexrun host->disk"}
        expected |= (
            {"flexrun disk->device"}
            if device == "cpu"
            else {"flexrun disk->host", "flexrun host->device", "flexrun device->host"}
        )
        assert names == expected
        opened = traces.open_files().items() - traces.descriptors.items()
        assert len(opened) == 1
        assert all(str(traces.directory) in target for _, target in opened)
        assert list(traces.directory.iterdir()) == []


@both_devices
def test_close_leaves_nothing(tiny_llama_dir, traces, device):
    """After close the engine's threads, descriptors and files are gone, and so is the engine."""
    llm = LLM(tiny_llama_dir, **settings(device, traces.directory))
    engine = weakref.ref(engine_of(llm))
    generate(llm, PROMPTS, 4)
    llm.close()
    llm.close()
    traces.assert_gone()
    gc.collect()
    assert engine() is None


@both_devices
@pytest.mark.parametrize("read", [40, 43])
def test_an_error_in_a_sweep_leaves_nothing(tiny_llama_dir, traces, monkeypatch, device, read):
    """A disk that fails within a sweep ends the run with its error, and all is given back."""
    llm = LLM(tiny_llama_dir, **settings(device, traces.directory))
    fail_at_read(monkeypatch, read)
    with pytest.raises(OffloadStoreError, match="the disk is gone"):
        llm.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS],
            SamplingParams(temperature=0, max_tokens=8),
            use_tqdm=False,
        )
    traces.assert_gone()


def fail_at_read(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    read, calls = OffloadFile.read, []

    def failing(file: OffloadFile, offset: int, target: torch.Tensor) -> None:
        calls.append(offset)
        if len(calls) == number:
            raise OffloadStoreError("the disk is gone")
        read(file, offset, target)

    monkeypatch.setattr(OffloadFile, "read", failing)


@both_devices
def test_a_model_that_does_not_fit_leaves_nothing(tiny_llama_dir, traces, device):
    """An engine that runs out of a budget half way through loading gives back what it had."""
    for budget in range(100, 900, 50):
        try:
            more = {"device_memory": f"{budget}KiB"}
            LLM(tiny_llama_dir, **settings(device, traces.directory) | more).close()
        except CapacityError:
            assert budget < 850
        traces.assert_gone()


def test_a_broken_checkpoint_leaves_nothing(tiny_llama_dir, traces, tmp_path):
    """A checkpoint that cannot be read half way through loading leaves nothing."""
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    llm = LLM(model, **settings("emulated", traces.directory))
    llm.close()
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    with pytest.raises(CheckpointError):
        LLM(model, **settings("emulated", traces.directory))
    traces.assert_gone()
