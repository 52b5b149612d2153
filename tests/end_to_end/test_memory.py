"""The process stays as small as promised, and leaves no threads, descriptors, files or memory."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from flexrun import LLM, CapacityError, CheckpointError, SamplingParams
from offload.direct_file import DirectFile
from offload.errors import OffloadStoreError
from offload.prepared_layout import FOLDER
from offload.tiers import LEAVING_BATCHES, MemoryAccount, Tier
from policy_search.machine import multiplies_bfloat16
from tests.end_to_end.harness import engine_of, generate
from tests.end_to_end.reference import ragged_prompts

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
OVERHEAD = 192 * MIB
"""Most resident memory beside weights that stay in RAM, counted from the imports on.

The compiler's is not counted, which only the first run of a version needs.

Working memory takes 80 MiB of it: one slot for the output head (54 MiB), three of 7 MiB for layers,
KV pages of 8 prompts. The rest is the tokenizer, the model's modules, what torch and transformers
import on first use, activations, and what the allocator keeps: 70 to 90 MiB where it was measured.
"""
HEAD_IN_FLOAT32 = 49152 * 576 * 4
"""A CPU without fast bfloat16 products has the largest unit's weights, the head's, once more."""

# Prints memory right after the imports, and what they compile, then at its peak.
CHILD = """
import json, sys
import torch, transformers, transformers.models.llama.modeling_llama
from flexrun import LLM, SamplingParams
import flexrun.engine
from flexrun.attention.cpu import CpuAttention
from offload.paged_kv import KVFormat

for dtype in (torch.bfloat16, torch.float32):
    CpuAttention(1).compile(KVFormat(dtype))

def memory(field):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[field].split()[0]) * 1024

before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
model, weights = sys.argv[1:]
with LLM(model, device="cpu", dtype="bfloat16", weights=weights, kv_cache="device=100") as llm:
    prompts = [f"{i}: The river" + " runs" * i for i in range(8)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    shape = llm._engine._runtime.shape
    sizes = {"weights": shape.weight_bytes, "expanded": shape.expanded_bytes}
tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
print(json.dumps(sizes | {"growth": memory("VmHWM") - before, "tokens": tokens}))
"""


def measure(model: Path, weights: str) -> dict[str, int]:
    """Bytes of a child process that runs 8 prompts; its growth without the expanded weights."""
    command = [sys.executable, "-c", CHILD, str(model), weights]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["expanded"] == (0 if multiplies_bfloat16() else HEAD_IN_FLOAT32)
    found["growth"] -= found["expanded"]
    return found


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

    def opened(self) -> list[str]:
        """Files that descriptors from now are open on, besides those from before."""
        now = self.open_files().items() - self.descriptors.items()
        return [target for _, target in now]

    def files(self) -> list[str]:
        """All that lies in the offload directory."""
        paths = self.directory.rglob("*")
        return sorted(str(path.relative_to(self.directory)) for path in paths)

    def assert_gone(self, *kept: str) -> None:
        """Nothing is left but the files `kept`."""
        assert set(threading.enumerate()) - self.threads == set()
        assert self.open_files() == self.descriptors
        assert self.files() == sorted(kept)


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


PREPARE = {"dtype": "float16"}
"""The checkpoint is in float32, so that its weights cannot be read as they are."""
LOCK = f"{FOLDER}/lock"


def store_files(directory: Path) -> list[str]:
    """The lock, and the one prepared store in an offload directory."""
    (store,) = [path.name for path in (directory / FOLDER).iterdir() if path.is_dir()]
    names = ("weights.bin", "checksums.bin", "index.json")
    inside = [f"{FOLDER}/{store}/{name}" for name in names]
    return [FOLDER, LOCK, f"{FOLDER}/{store}", *inside]


@both_devices
@pytest.mark.parametrize("prepared", [False, True], ids=["in-place", "prepared"])
def test_a_run_shows_its_traces(tiny_llama_dir, traces, device, prepared):
    """A running engine has its links' threads, and only the files that weights are read from."""
    more = PREPARE if prepared else {}
    with LLM(tiny_llama_dir, **settings(device, traces.directory) | more) as llm:
        started = [thread.name for thread in set(threading.enumerate()) - traces.threads]
        reading = {"flexrun disk->device": 4} if device == "cpu" else {"flexrun disk->host": 2}
        others = ["host->disk"]
        others += [] if device == "cpu" else ["host->device", "device->host"]
        assert Counter(started) == reading | {f"flexrun {link}": 2 for link in others}
        generate(llm, PROMPTS, 4)
        read = tiny_llama_dir / "model.safetensors"
        if prepared:
            files = store_files(traces.directory)
            assert traces.files() == sorted(files)
            (read,) = [traces.directory / name for name in files if name.endswith("weights.bin")]
        else:
            assert traces.files() == []
        # One descriptor past the page cache, one for rows of the embedding, which are no blocks.
        assert 1 <= len(traces.opened()) <= 2
        assert set(traces.opened()) == {str(read)}


@both_devices
def test_a_prepared_store_is_all_that_stays(tiny_llama_dir, traces, device):
    """After close the store, its lock and nothing else is there; later runs leave them as is."""
    for _ in range(2):
        llm = LLM(tiny_llama_dir, **settings(device, traces.directory) | PREPARE)
        engine = weakref.ref(engine_of(llm))
        generate(llm, PROMPTS, 4)
        llm.close()
        traces.assert_gone(*store_files(traces.directory))
        gc.collect()
        assert engine() is None


@both_devices
@pytest.mark.parametrize("write", [1, 2])
def test_an_error_while_preparing_leaves_nothing(
    tiny_llama_dir, traces, monkeypatch, device, write
):
    """A disk that fails while weights are prepared leaves the lock file and no part of a store."""
    monkeypatch.setattr("offload.prepared_writer.WRITE_BYTES", 64 * 1024)
    fail_at(monkeypatch, "write", write)
    with pytest.raises(OffloadStoreError, match="the disk is gone"):
        LLM(tiny_llama_dir, **settings(device, traces.directory) | PREPARE)
    traces.assert_gone(FOLDER, LOCK)


KV_ON_DISK = {"kv_cache": "device=20,disk=80"}


@both_devices
@pytest.mark.parametrize("more", [{}, KV_ON_DISK], ids=["kv-in-memory", "kv-on-disk"])
def test_close_leaves_nothing(tiny_llama_dir, traces, device, more):
    """After close the engine's threads, descriptors and files are gone, and so is the engine.

    KV pages on disk have no file of a name, so a job that is killed leaves none either.
    """
    llm = LLM(tiny_llama_dir, **settings(device, traces.directory) | more)
    engine = weakref.ref(engine_of(llm))
    generate(llm, PROMPTS, 4)
    assert traces.files() == []
    assert any("kv-" in path for path in traces.opened()) == bool(more)
    llm.close()
    llm.close()
    traces.assert_gone()
    gc.collect()
    assert engine() is None


@both_devices
@pytest.mark.parametrize("prepared", [False, True], ids=["in-place", "prepared"])
@pytest.mark.parametrize("read", [40, 43])
def test_an_error_in_a_sweep_leaves_nothing(
    tiny_llama_dir, traces, monkeypatch, device, read, prepared
):
    """A disk that fails within a sweep ends the run with its error, and all is given back."""
    more = PREPARE if prepared else {}
    llm = LLM(tiny_llama_dir, **settings(device, traces.directory) | more)
    fail_at(monkeypatch, "read", read)
    with pytest.raises(OffloadStoreError, match="the disk is gone"):
        llm.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS],
            SamplingParams(temperature=0, max_tokens=8),
            use_tqdm=False,
        )
    traces.assert_gone(*(store_files(traces.directory) if prepared else ()))


@both_devices
@pytest.mark.parametrize("write", [1, 9])
def test_kv_pages_that_are_not_written_end_the_run(
    tiny_llama_dir, traces, monkeypatch, device, write
):
    """A disk that does not take a page of the KV cache ends the run, and all is given back."""
    more = {"weights": "device=100", "kv_cache": "disk=100"}
    llm = LLM(tiny_llama_dir, **settings(device, traces.directory) | more)
    fail_at(monkeypatch, "write", write)
    with pytest.raises(OffloadStoreError, match="the disk is gone"):
        llm.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS],
            SamplingParams(temperature=0, max_tokens=30),
            use_tqdm=False,
        )
    traces.assert_gone()


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """The `number`th request to `read` or `write` a file from now on fails."""
    original, calls = getattr(DirectFile, name), itertools.count(1)

    def failing(file: DirectFile, offset: int, data: torch.Tensor) -> None:
        if next(calls) == number:
            raise OffloadStoreError("the disk is gone")
        original(file, offset, data)

    monkeypatch.setattr(DirectFile, name, failing)


@both_devices
def test_a_model_that_does_not_fit_leaves_nothing(tiny_llama_dir, traces, device):
    """An engine that runs out of a budget half way through loading gives back what it had."""
    for budget in range(100, 1050, 50):
        try:
            more = {"device_memory": f"{budget}KiB"}
            LLM(tiny_llama_dir, **settings(device, traces.directory) | more).close()
        except CapacityError:
            assert budget < 1000
        traces.assert_gone()


@both_devices
@pytest.mark.parametrize("kv_cache", ["device=100", "host=100"])
def test_new_rows_on_their_way_are_charged(tiny_llama_dir, tmp_path, monkeypatch, device, kv_cache):
    """DEVICE pays for rows that may be leaving for HOST, where that is another memory."""
    charged: Counter[tuple[Tier, str]] = Counter()
    charge = MemoryAccount.charge

    def noted(account: MemoryAccount, tier: Tier, nbytes: int, what: str) -> None:
        charged[tier, what] += nbytes
        charge(account, tier, nbytes, what)

    monkeypatch.setattr(MemoryAccount, "charge", noted)
    more = settings(device, tmp_path) | {"kv_cache": kv_cache}
    with LLM(tiny_llama_dir, **more) as llm:
        row = max(engine_of(llm)._runtime.shape.kv_bytes_per_token)
    leave = device == "emulated" and kv_cache == "host=100"
    found = charged[Tier.DEVICE, "new keys and values that leave"]
    assert found == (LEAVING_BATCHES * 16 * row if leave else 0)


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
