"""Weights stored in 16 bits and computed in float32, from the checkpoint or a prepared store."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexrun import LLM
from offload.prepared_layout import FOLDER
from offload.tiers import Split, Tier
from policy_search import machine
from tests.end_to_end.harness import SPLITS, Run, engine_of, generate
from tests.end_to_end.reference import greedy_tokens, ragged_prompts
from tests.end_to_end.test_bytes import (
    KV_TOKEN_BYTES,
    PAGE,
    counted,
    disk_padding,
    placeable,
    streamed_bytes,
)
from tests.tiny_models import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "slow_16_bit_products")

NEW_TOKENS = 6
PROMPTS = [list(text.encode()) for text in ragged_prompts(16, longest=7)]
DTYPES = ("bfloat16", "float16")
DEVICES = ("cpu", "emulated")
STORE_BLOCK = 16 * 1024
ON_DISK = [split for split in SPLITS if "disk" in split]


@pytest.fixture
def slow_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's CPU can do, the engine takes it for one without fast bfloat16."""
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: False)


@dataclass(frozen=True)
class Stored:
    """A checkpoint in a 16-bit type, and what transformers generates from it in float32."""

    directory: Path
    reference: list[list[int]]


def round_checkpoint(source: Path, target: Path, dtype: str) -> Stored:
    """The model in `source` with every weight rounded to `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    model.save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    return Stored(target, greedy_tokens(target, PROMPTS, NEW_TOKENS, [0]))


@pytest.fixture(scope="module")
def rounded(tmp_path_factory, tiny_llama_dir) -> dict[str, Stored]:
    """The tiny Llama rounded to each type; the originals in float32 have other tokens."""
    root = tmp_path_factory.mktemp("rounded")
    found = {dtype: round_checkpoint(tiny_llama_dir, root / dtype, dtype) for dtype in DTYPES}
    whole = greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])
    assert len({str(whole), *(str(each.reference) for each in found.values())}) > 1
    return found


@pytest.fixture(scope="module")
def rounded_tied(tmp_path_factory, tiny_tied_llama_dir) -> Stored:
    target = tmp_path_factory.mktemp("rounded_tied") / "model"
    return round_checkpoint(tiny_tied_llama_dir, target, "bfloat16")


def settings(device: str, weights: str, offload: Path, **more: Any) -> dict[str, Any]:
    """Ten of the sixteen prompts at a time, three micro-batches a sweep."""
    common = {"device": device, "weights": weights, "kv_cache": "device=50,host=50"}
    cut = {"num_micro_batches": 3, "micro_batch_rows": 16, "max_rows": 48, "max_sequences": 10}
    return common | cut | {"offload_dir": offload} | more


def expanded_run(directory: Path, stored: str, **chosen: Any) -> Run:
    """A run, after a check that it has weights `stored` so and computes in float32."""
    with LLM(directory, **chosen) as llm:
        runtime = engine_of(llm)._runtime
        assert (runtime.stored, runtime.dtype) == (getattr(torch, stored), torch.float32)
        done = generate(llm, PROMPTS, NEW_TOKENS)
    assert max(done.micro_batches) >= 3
    return done


@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bit_weights_give_float32_tokens(rounded, tmp_path, dtype, device, weights):
    """A 16-bit checkpoint gives transformers' float32 tokens from every tier, read in place."""
    stored = rounded[dtype]
    done = expanded_run(stored.directory, dtype, **settings(device, weights, tmp_path))
    assert done.tokens == stored.reference
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", ["device=100", "host=100", "disk=100", "device=30,disk=70"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_tied_table_is_expanded_where_it_is_used(rounded_tied, tmp_path, device, weights):
    """One 16-bit matrix serves as embedding, by its rows, and as output head."""
    chosen = settings(device, weights, tmp_path)
    done = expanded_run(rounded_tied.directory, "bfloat16", **chosen)
    assert done.tokens == rounded_tied.reference


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_schedules_do_not_matter(rounded, tmp_path, device, micro_batches, overlap):
    """However sweeps are cut and executed, expanded weights are those of the right layer."""
    stored = rounded["bfloat16"]
    cut = {"num_micro_batches": micro_batches, "micro_batch_rows": 48 // micro_batches}
    more = settings(device, "device=25,host=50,disk=25", tmp_path) | cut | {"overlap": overlap}
    with LLM(stored.directory, **more) as llm:
        done = generate(llm, PROMPTS, NEW_TOKENS)
    assert done.tokens == stored.reference
    assert max(done.micro_batches) >= micro_batches


@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("device", DEVICES)
def test_links_carry_16_bits(rounded, tmp_path, device, weights):
    """Weights cross as they are stored, two bytes each and once a sweep; KV in float32."""
    directory = rounded["float16"].directory
    kv_cache = "host=100" if device == "emulated" else "device=100"
    chosen = settings(device, weights, tmp_path, kv_cache=kv_cache, attention="device")
    with LLM(directory, **chosen) as llm:
        done = generate(llm, PROMPTS, 4, ignore_eos=True)
    sweeps, specs = len(done.plans), placeable(directory, 4, value_bytes=2)
    expected = streamed_bytes(specs, weights, device)
    assert counted(done, "weights") == {link: n * sweeps for link, n in expected.items()}
    padding = sweeps * sum(disk_padding(directory, specs, weights).values())
    assert set(counted(done, "padding").values()) == ({padding} if padding else set())
    if device == "emulated":
        spans = [s for plan in done.plans for batch in plan.micro_batches for s in batch.spans]
        pages = sum(-(-span.start // PAGE) for span in spans)
        assert counted(done, "kv") == {
            "device->host": sum(span.length for span in spans) * KV_TOKEN_BYTES,
            "host->device": pages * PAGE * KV_TOKEN_BYTES,
        }


def test_a_processor_with_fast_products_does_not_expand(rounded, tmp_path, monkeypatch):
    """Where bfloat16 is fast it is computed in; float16 is expanded on any CPU."""
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: True)
    for dtype, computed in (("bfloat16", torch.bfloat16), ("float16", torch.float32)):
        chosen = settings("cpu", "device=50,disk=50", tmp_path)
        with LLM(rounded[dtype].directory, **chosen) as llm:
            runtime = engine_of(llm)._runtime
            assert (runtime.stored, runtime.dtype) == (getattr(torch, dtype), computed)
            assert bool(runtime.shape.expanded_bytes) == (computed is torch.float32)
            assert generate(llm, PROMPTS, 2).summary["generated_tokens"] > len(PROMPTS)


def store_of(offload: Path) -> Path:
    """The one prepared store in an offload directory."""
    (store,) = [path for path in (offload / FOLDER).iterdir() if path.is_dir()]
    return store


@pytest.mark.parametrize("weights", ON_DISK)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prepared_store_gives_the_same_tokens(
    tiny_llama_dir, rounded, tmp_path, dtype, device, weights
):
    """A float32 checkpoint run in 16 bits is prepared once; the next run reuses the store.

    Both give the tokens of transformers from the rounded weights, and only the first is charged.
    """
    chosen = settings(device, weights, tmp_path, dtype=dtype)
    charged, files = [], []
    for _ in range(2):
        done = expanded_run(tiny_llama_dir, dtype, **chosen)
        assert done.tokens == rounded[dtype].reference
        charged.append(done.summary["peak_bytes"]["disk"])
        store = store_of(tmp_path)
        files.append({f.name: (f.stat().st_mtime_ns, f.stat().st_ino) for f in store.iterdir()})
    assert files[0] == files[1]
    assert charged == [(store / "weights.bin").stat().st_size, 0]


def test_without_weights_on_disk_nothing_is_prepared(tiny_llama_dir, rounded, tmp_path):
    """A run that casts weights into memory writes nothing."""
    chosen = settings("emulated", "device=50,host=50", tmp_path, dtype="bfloat16")
    done = expanded_run(tiny_llama_dir, "bfloat16", **chosen)
    assert done.tokens == rounded["bfloat16"].reference
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", DEVICES)
def test_a_prepared_store_is_read_once_a_sweep(tiny_llama_dir, tmp_path, device):
    """From a store a unit is one run of whole blocks: weights and padding to the byte."""
    chosen = settings(device, "disk=100", tmp_path, dtype="float16")
    specs = placeable(tiny_llama_dir, 4, value_bytes=2)
    needed = padding = 0
    for unit in range(5):
        nbytes = [spec.nbytes for spec in specs if spec.unit == unit]
        assert all(each % 64 == 0 for each in nbytes), "tensors lie next to each other"
        needed += sum(nbytes)
        padding += math.ceil(sum(nbytes) / STORE_BLOCK) * STORE_BLOCK - sum(nbytes)
    for _ in range(2):
        with LLM(tiny_llama_dir, **chosen) as llm:
            done = generate(llm, PROMPTS, 4, ignore_eos=True)
        sweeps = len(done.plans)
        links = ["disk->device"] if device == "cpu" else ["disk->host", "host->device"]
        assert counted(done, "weights") == dict.fromkeys(links, sweeps * needed)
        assert counted(done, "padding") == dict.fromkeys(links, sweeps * padding)


def test_a_changed_checkpoint_is_prepared_anew(tiny_llama_dir, rounded, tmp_path):
    """A store of other weights is not taken for this checkpoint's, nor thrown away."""
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    offload = tmp_path / "offload"
    chosen = settings("cpu", "disk=100", offload, dtype="bfloat16")
    expanded_run(model, "bfloat16", **chosen)
    first = store_of(offload)
    shutil.copy2(rounded["bfloat16"].directory / "model.safetensors", model)
    with LLM(model, **chosen) as llm:
        generate(llm, PROMPTS, NEW_TOKENS)
    assert store_of(offload) == first, "these weights are read in place"
    other = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    other.save_pretrained(model)
    done = expanded_run(model, "bfloat16", **chosen)
    expected = round_checkpoint(model, tmp_path / "expected", "bfloat16")
    assert done.tokens == expected.reference != rounded["bfloat16"].reference
    stores = {path for path in (offload / FOLDER).iterdir() if path.is_dir()}
    assert first in stores
    assert len(stores) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_room_for_expanded_weights_is_counted(rounded, tmp_path, device):
    """One buffer of the largest unit's weights in float32 is charged, whatever is where."""
    directory = rounded["bfloat16"].directory
    by_unit: dict[int, int] = {}
    for spec in placeable(directory, 4, value_bytes=4):
        by_unit[spec.unit] = by_unit.get(spec.unit, 0) + spec.nbytes
    largest = max(nbytes for unit, nbytes in by_unit.items() if unit >= 0)
    for weights in ("device=100", "disk=100"):
        chosen = settings(device, weights, tmp_path)
        with LLM(directory, **chosen) as llm:
            runtime = engine_of(llm)._runtime
            store = runtime.weights.store
            assert runtime.shape.expanded_bytes == largest
            assert store._expansion is not None
            assert store._expansion._room.nbytes == largest
            share = Split.parse(weights).fraction(Tier.DEVICE)
            assert runtime.backend.account.used[Tier.DEVICE] > largest + share * sum(
                nbytes // 2 for nbytes in by_unit.values()
            )
