"""Bytes are what the formulas say: weights once a sweep, KV by the page, budgets never exceeded."""

from __future__ import annotations

import json
import random
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from flexrun import LLM, SamplingParams
from flexrun.executor import Executor
from offload.backend import DeviceBackend
from offload.backend_cpu import CpuBackend
from offload.backend_emulated import EmulatedBackend
from offload.links import Link
from offload.placement import TensorSpec, bytes_per_tier, place
from offload.tiers import Split, Tier
from policy_search.policy import Policy
from tests.end_to_end.harness import SPLITS, Run, engine_of, generate, run, run_to_the_end
from tests.end_to_end.reference import ragged_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [list(text.encode()) for text in ragged_prompts(16, longest=7)]
PAGE = 32
KV_TOKEN_BYTES = 4 * 2 * 2 * 16 * 4
"""Of the tiny Llama: layers x (key and value) x KV heads x head size x float32."""
DEVICES = ("cpu", "emulated")


def stored_tensors(directory: Path) -> dict[str, int]:
    """Elements of every tensor in a checkpoint, read from the files' headers alone."""
    elements: dict[str, int] = {}
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__":
                elements[name] = torch.Size(entry["shape"]).numel()
    return elements


def placeable(directory: Path, layers: int, value_bytes: int = 4) -> list[TensorSpec]:
    """All weights but the final norm, each with the layer that uses it; the table is layer -1.

    A table that is the output head as well is used by the head, which comes after the last layer.
    """
    elements = stored_tensors(directory)
    tied = "lm_head.weight" not in elements
    specs = []
    for name, count in elements.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer:
            unit = int(layer[1])
        elif "embed_tokens" in name:
            unit = layers if tied else -1
        elif name == "lm_head.weight":
            unit = layers
        else:
            assert name == "model.norm.weight"
            continue
        specs.append(TensorSpec(name, unit, count * value_bytes))
    return specs


BLOCK = 4096
BRIDGED = 64 * 1024
"""A gap of at most this many bytes between two weights on disk is read along."""


def file_places(directory: Path) -> dict[str, tuple[str, int, int]]:
    """File, first byte and end of every tensor, from the files' headers alone."""
    places = {}
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                places[name] = (path.name, 8 + size + start, 8 + size + end)
    return places


def disk_padding(directory: Path, specs: list[TensorSpec], weights: str) -> dict[int, int]:
    """Bytes that are no weights in the blocks that each unit reads of a checkpoint, per sweep."""
    tiers, places = place(specs, Split.parse(weights)), file_places(directory)
    padding: dict[int, int] = {}
    for unit in {spec.unit for spec in specs if spec.unit >= 0}:
        names = [s.name for s in specs if s.unit == unit and tiers[s.name] is Tier.DISK]
        runs: list[tuple[str, int, int]] = []
        for file, start, end in sorted(places[name] for name in names):
            if runs and runs[-1][0] == file and start - runs[-1][2] <= BRIDGED:
                runs[-1] = (file, runs[-1][1], end)
            else:
                runs.append((file, start, end))
        blocks = sum(-(-end // BLOCK) - start // BLOCK for _, start, end in runs)
        needed = sum(places[name][2] - places[name][1] for name in names)
        padding[unit] = blocks * BLOCK - needed
        gaps = max(0, len(names) - 1) * BRIDGED
        assert 0 <= padding[unit] <= len(runs) * 2 * (BLOCK - 1) + gaps
    return padding


def streamed_bytes(specs: list[TensorSpec], weights: str, device: str) -> dict[str, int]:
    """Weight bytes that must cross each link in a sweep."""
    tiers = place(specs, Split.parse(weights))
    on: Counter[Tier] = Counter()
    for spec in specs:
        if spec.unit >= 0:  # rows of the embedding table travel, never the table
            on[tiers[spec.name]] += spec.nbytes
    if device == "cpu":
        links = {"disk->device": on[Tier.DISK]}
    else:
        links = {"disk->host": on[Tier.DISK], "host->device": on[Tier.HOST] + on[Tier.DISK]}
    return {link: nbytes for link, nbytes in links.items() if nbytes}


def counted(done: Run, kind: str) -> dict[str, int]:
    by_link = done.summary["bytes_by_kind"]
    return {link: kinds[kind] for link, kinds in by_link.items() if kind in kinds}


def settings(device: str, weights: str, micro_batches: int = 1, **more: Any) -> dict[str, Any]:
    cut = {"num_micro_batches": micro_batches, "micro_batch_rows": 48 // micro_batches}
    common = {"device": device, "weights": weights, "kv_cache": "device=100", "dtype": "float32"}
    return common | cut | {"max_rows": 48, "max_sequences": 12} | more


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_tied_llama_dir"])
def test_weights_cross_their_link_once_a_sweep(request, model, device, weights, micro_batches):
    """Each weight that is not at home on the device crosses once per sweep, to the byte.

    So does what completes the blocks of the disk, which is counted apart.
    """
    directory = request.getfixturevalue(model)
    done = run_to_the_end(directory, PROMPTS, 4, **settings(device, weights, micro_batches))
    assert max(done.micro_batches) >= micro_batches
    assert micro_batches > 1 or set(done.micro_batches) == {1}
    sweeps = done.summary["sweeps"]
    assert sweeps == len(done.plans) > 8
    assert [plan.last for plan in done.plans] == [False] * (sweeps - 1) + [True]
    specs = placeable(directory, 4)
    expected = streamed_bytes(specs, weights, device)
    assert counted(done, "weights") == {link: n * sweeps for link, n in expected.items()}
    padding = sweeps * sum(disk_padding(directory, specs, weights).values())
    links = ("disk->device",) if device == "cpu" else ("disk->host", "host->device")
    assert counted(done, "padding") == (dict.fromkeys(links, padding) if padding else {})


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
@pytest.mark.parametrize("weights", ["disk=100", "device=25,host=50,disk=25"])
@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_tied_llama_dir"])
def test_any_look_ahead_moves_the_same_bytes(request, model, weights, depth):
    """However many layers are asked for ahead: the same tokens, each layer once per sweep."""
    directory = request.getfixturevalue(model)
    more = settings("emulated", weights, 3, policy=policy_of("emulated", weights, depth))
    done = run_to_the_end(directory, PROMPTS, 4, **more)
    assert (
        done.tokens == run_to_the_end(directory, PROMPTS, 4, **settings("cpu", "device=100")).tokens
    )
    sweeps, specs = len(done.plans), placeable(directory, 4)
    expected = streamed_bytes(specs, weights, "emulated")
    assert counted(done, "weights") == {link: n * sweeps for link, n in expected.items()}


def policy_of(device: str, weights: str, depth: int) -> Policy:
    """What `settings` say, with a look-ahead that a person chose."""
    plan = settings(device, weights, 3)
    return Policy(
        weights=Split.parse(weights),
        kv_cache=Split.parse(plan["kv_cache"]),
        micro_batch_rows=plan["micro_batch_rows"],
        num_micro_batches=plan["num_micro_batches"],
        max_rows=plan["max_rows"],
        max_sequences=plan["max_sequences"],
        prefetch_depth=depth,
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_an_end_that_nobody_foresaw_costs_the_layers_fetched_ahead(tiny_llama_dir, device, depth):
    """Where the job ends early, its bytes are a sweep's times the sweeps, and the look-ahead's.

    The next job of the same engine needs those layers, so that it fetches them no more.
    """
    prompt, weights = PROMPTS[0], "disk=100"
    more = settings(device, weights, policy=policy_of(device, weights, depth))
    specs = placeable(tiny_llama_dir, 4)
    by_unit = Counter[int]()
    for spec in specs:
        by_unit[spec.unit] += spec.nbytes
    a_sweep = sum(by_unit.values()) - by_unit[-1]
    (link, *_) = links = ("disk->device",) if device == "cpu" else ("disk->host", "host->device")
    with LLM(tiny_llama_dir, **more) as llm:
        transfers = engine_of(llm)._runtime.transfers
        whole = generate(llm, [prompt], 4, ignore_eos=True)
        assert len(whole.plans) == 4
        assert counted(whole, "weights") == dict.fromkeys(links, 4 * a_sweep)
        stop = whole.tokens[0][1]
        assert stop != whole.tokens[0][0]
        early = generate(llm, [prompt], 4, stop_token_ids=[stop])
        assert [plan.last for plan in early.plans] == [False, False]
        again = generate(llm, [prompt], 4, ignore_eos=True)
        assert again.tokens == whole.tokens
        assert counted(again, "weights") == dict.fromkeys(links, 10 * a_sweep)
        generate(llm, [prompt], 4, stop_token_ids=[stop])
    # After close, when nothing is on its way any more.
    extra = sum(by_unit[unit] for unit in range(depth))
    assert transfers.counters[Link(link)].bytes["weights"] == 12 * a_sweep + extra


def test_weights_of_a_real_model_cross_once_a_sweep(smollm2_dir):
    """The same holds to the byte for a model of 135M parameters on three tiers."""
    weights, prompts = "device=25,host=50,disk=25", [[i, i + 1, i + 2] for i in range(100, 108)]
    more = settings("emulated", weights, 3) | {"dtype": "bfloat16"}
    done = run_to_the_end(smollm2_dir, prompts, 2, **more)
    specs = placeable(smollm2_dir, 30, value_bytes=2)
    expected = streamed_bytes(specs, weights, "emulated")
    assert sum(expected.values()) > 100e6
    assert done.summary["sweeps"] == 2
    assert max(done.micro_batches) == 3
    assert counted(done, "weights") == {link: 2 * n for link, n in expected.items()}
    padding = 2 * sum(disk_padding(smollm2_dir, specs, weights).values())
    assert counted(done, "padding") == {"disk->host": padding, "host->device": padding}
    assert padding < 0.02 * 2 * expected["disk->host"]


@pytest.mark.parametrize("weights", ["host=100", "disk=100"])
@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_tied_llama_dir"])
def test_rows_of_the_embedding_travel_not_the_table(request, model, weights):
    """Per sweep, each token id that occurs brings one row of the table, once."""
    directory = request.getfixturevalue(model)
    done = run(directory, PROMPTS, 4, **settings("emulated", weights, 3))
    assert max(done.micro_batches) >= 3
    rows = 0
    for plan in done.plans:
        ids = set()
        for span in (span for batch in plan.micro_batches for span in batch.spans):
            tokens = PROMPTS[span.sequence] + done.tokens[span.sequence]
            ids |= set(tokens[span.start : span.end])
        rows += len(ids)
    expected = {"host->device": rows * 64 * 4}
    if weights == "disk=100":
        expected["disk->host"] = rows * 64 * 4
    assert counted(done, "embedding") == expected


@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_tied_llama_dir"])
def test_every_weight_has_one_home(request, model, device, weights):
    """Homes hold the checkpoint's bytes once, a tied table too, and follow the placement."""
    directory = request.getfixturevalue(model)
    specs = placeable(directory, 4)
    expected = bytes_per_tier(specs, place(specs, Split.parse(weights)))
    expected[Tier.DEVICE] += 64 * 4  # the final norm
    assert sum(expected.values()) == 4 * sum(stored_tensors(directory).values())
    with LLM(directory, **settings(device, weights)) as llm:
        loaded = engine_of(llm)._runtime.weights
        assert loaded.placed == expected
        homes = {spec.name: loaded.store.view(spec.name) for spec in specs}
        assert {name: home.nbytes for name, home in homes.items()} == {
            spec.name: spec.nbytes for spec in specs
        }


@pytest.mark.parametrize("seed", range(30))
def test_shares_of_a_real_model_are_met(smollm2_dir, seed):
    """Of a real model, a fifth of it one tensor, every tier gets its share to one percent."""
    draw = random.Random(seed)
    cuts = sorted(draw.randint(0, 100) for _ in range(2))
    split = Split(device=cuts[0], host=cuts[1] - cuts[0], disk=100 - cuts[1])
    specs = placeable(smollm2_dir, 30)
    total = sum(spec.nbytes for spec in specs)
    assert max(spec.nbytes for spec in specs) > total / 5
    placed = bytes_per_tier(specs, place(specs, split))
    for tier in Tier:
        assert placed[tier] / total == pytest.approx(split.fraction(tier), abs=0.01)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_kv_crosses_as_the_formula_says(tiny_llama_dir, micro_batches):
    """New rows go to HOST to the byte; what is read back is within a page per sequence."""
    more = settings("emulated", "device=100", micro_batches, kv_cache="host=100")
    done = run(tiny_llama_dir, PROMPTS, 8, attention="device", **more)
    spans = [span for plan in done.plans for batch in plan.micro_batches for span in batch.spans]
    kv = counted(done, "kv")
    assert kv["device->host"] == sum(span.length for span in spans) * KV_TOKEN_BYTES
    reads = [span.start for span in spans if span.start]
    formula = sum(reads) * KV_TOKEN_BYTES
    assert formula <= kv["host->device"] < formula + len(reads) * PAGE * KV_TOKEN_BYTES
    assert kv["host->device"] == sum(-(-start // PAGE) for start in reads) * PAGE * KV_TOKEN_BYTES


@pytest.mark.parametrize("device", DEVICES)
def test_kv_on_the_device_does_not_move(tiny_llama_dir, device):
    """With KV on DEVICE, and on a CPU anywhere, no KV byte crosses a link."""
    kv_cache = "device=100" if device == "emulated" else "device=50,host=50"
    done = run(tiny_llama_dir, PROMPTS, 4, **settings(device, "disk=100", 3, kv_cache=kv_cache))
    assert counted(done, "kv") == {}


class Arena:
    """Notes every tensor that is allocated on a tier and not freed yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[DeviceBackend]) -> None:
        self.live: dict[int, tuple[Tier, int]] = {}
        self.peak = dict.fromkeys(Tier, 0)
        allocate, free = kind.allocate, kind.free

        def allocated(backend: Any, tier: Tier, nbytes: int, what: str) -> torch.Tensor:
            tensor = allocate(backend, tier, nbytes, what)
            self.live[id(tensor)] = (tier, tensor.untyped_storage().nbytes())
            self.peak[tier] = max(self.peak[tier], self.bytes_on(tier))
            return tensor

        def freed(backend: Any, tier: Tier, tensor: torch.Tensor) -> None:
            assert self.live.pop(id(tensor))[0] is tier
            free(backend, tier, tensor)

        monkeypatch.setattr(kind, "allocate", allocated)
        monkeypatch.setattr(kind, "free", freed)

    def bytes_on(self, tier: Tier) -> int:
        return sum(nbytes for where, nbytes in self.live.values() if where is tier)


@pytest.mark.parametrize("kv_cache", ["device=100", "host=100", "device=50,host=50"])
@pytest.mark.parametrize("weights", SPLITS)
def test_an_arena_is_never_larger_than_its_capacity(tiny_llama_dir, monkeypatch, weights, kv_cache):
    """All that an emulated device holds at a time is within its capacity; none is kept."""
    arena = Arena(monkeypatch, EmulatedBackend)
    padding = disk_padding(tiny_llama_dir, placeable(tiny_llama_dir, 4), weights)
    # Working memory holds what is read, so a small model's gaps take room for two layers and head.
    capacity = 1100 * 1024 + 2 * max(padding[layer] for layer in range(4)) + padding[4]
    more = settings("emulated", weights, 3, kv_cache=kv_cache, emulate=f"capacity={capacity}")
    done = run(tiny_llama_dir, PROMPTS, 8, **more)
    peak = done.summary["peak_bytes"]["device"]
    assert 0 < arena.peak[Tier.DEVICE] <= peak <= capacity
    assert arena.live == {}


class BrokenSweepError(Exception):
    """What a test raises in the middle of a sweep."""


@pytest.mark.parametrize("broken", [False, True], ids=["closed", "broken-off"])
@pytest.mark.parametrize("weights", ["device=100", "device=25,host=50,disk=25"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_account_is_balanced(tiny_llama_dir, monkeypatch, device, weights, broken):
    """After close, also of a run that an error broke off, no byte is charged or allocated."""
    arena = Arena(monkeypatch, CpuBackend if device == "cpu" else EmulatedBackend)
    llm = LLM(tiny_llama_dir, **settings(device, weights, 3, kv_cache="device=50,host=50"))
    account = engine_of(llm)._runtime.backend.account
    assert account.used[Tier.DEVICE] > 0
    if broken:
        break_third_sweep(monkeypatch)
        with pytest.raises(BrokenSweepError):
            llm.generate(
                [{"prompt_token_ids": prompt} for prompt in PROMPTS],
                SamplingParams(temperature=0, max_tokens=8),
                use_tqdm=False,
            )
    else:
        generate(llm, PROMPTS, 8)
        llm.close()
    assert account.used == dict.fromkeys(Tier, 0)
    assert arena.live == {}


def break_third_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise between two layers of the third sweep, while bytes are on their way."""
    attend, calls = Executor._attend, Counter[str]()

    def broken(self: Executor, number: int, *call: Any) -> torch.Tensor:
        calls["attend"] += 1
        if calls["attend"] == 2 * 3 * 4 + 5:
            raise BrokenSweepError
        return attend(self, number, *call)

    monkeypatch.setattr(Executor, "_attend", broken)
