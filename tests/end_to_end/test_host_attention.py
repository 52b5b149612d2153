"""Pages on HOST attended to by the processor, beside a device of its own: the same tokens."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexrun import LLM
from flexrun.attention.cpu import CpuAttention
from flexrun.attention_speed import AttentionSpeed
from flexrun.plan import RowSpan
from offload.backend_emulated import EmulatedBackend
from offload.transfer import Transfer
from offload.transfer_engine import TransferEngine
from tests.backends import make_copies_late
from tests.end_to_end.harness import Run, engine_of, generate, run
from tests.end_to_end.reference import greedy_tokens, ragged_prompts
from tests.tiny_models import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [list(text.encode()) for text in ragged_prompts(16, longest=7)]
NEW_TOKENS = 8
LAYERS, HEADS, KV_HEADS, DIM = 4, 4, 2, 16
"""Of the tiny Llama."""


@pytest.fixture(scope="module")
def reference(tiny_llama_dir) -> list[list[int]]:
    return greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])


def settings(kv_cache: str, attention: str, **more: Any) -> dict[str, Any]:
    """Three micro-batches, chunks of prompts beside decoding rows, sequences that come and go."""
    common = {"device": "emulated", "dtype": "float32", "weights": "device=25,host=40,disk=35"}
    cut = {"max_rows": 36, "num_micro_batches": 3, "micro_batch_rows": 12, "max_sequences": 10}
    return common | cut | {"kv_cache": kv_cache, "attention": attention} | more


def single_rows(done: Run) -> list[RowSpan]:
    spans = [span for plan in done.plans for batch in plan.micro_batches for span in batch.spans]
    return [span for span in spans if span.length == 1]


@pytest.mark.parametrize("attention", ["device", "host", "auto"])
@pytest.mark.parametrize(
    "kv_cache",
    ["device=100", "host=100", "disk=100", "device=50,host=50", "host=50,disk=50",
     "device=40,host=30,disk=30"],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_tokens_are_the_same(tiny_llama_dir, reference, device, kv_cache, attention):
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **settings(kv_cache, attention, device=device))
    assert done.tokens == reference
    assert max(done.micro_batches) >= 3
    hosted = done.summary["links"].get("host attention")
    if attention == "device" or device == "cpu" or "host" not in kv_cache:
        assert hosted is None
    elif attention == "host":
        assert hosted is not None


@pytest.mark.parametrize("change", [
    {"overlap": False},
    {"num_micro_batches": 1, "micro_batch_rows": 36},
    {"num_micro_batches": 2, "micro_batch_rows": 18, "activations": "host=100"},
    {"activations": "device=50,host=50"},
], ids=["no-overlap", "one-micro-batch", "two", "activations"])  # fmt: skip
def test_however_sweeps_are_cut(tiny_llama_dir, reference, change):
    """Without overlap, with nothing to overlap, with activations that come and go."""
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **settings("host=100", "host", **change))
    assert done.tokens == reference
    assert done.summary["links"]["host attention"]["busy_share"] > 0


@pytest.mark.parametrize(
    ("kv_cache", "micro_batches"), [("host=100", 5), ("device=40,host=30,disk=30", 3)]
)
def test_results_do_not_depend_on_when_bytes_arrive(
    tiny_llama_dir, reference, monkeypatch, kv_cache, micro_batches
):
    """Queries, pages, weights and activations come late, and so do the processor's results.

    Three turns of memory are taken by the same micro-batches each time, or by others.
    """
    make_copies_late(monkeypatch, seed=1)
    more = {"activations": "host=100", "max_sequences": 6, "num_micro_batches": micro_batches}
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **settings(kv_cache, "host", **more))
    assert done.tokens == reference


def test_results_come_back_after_all_that_computed_with_those_before(tiny_llama_dir, monkeypatch):
    """Their memory is used again: its copy waits for what the device was given until then."""
    events: list[object] = []

    def record(_: EmulatedBackend) -> object:
        events.append(object())
        return events[-1]

    copies: dict[str, list[Any]] = {"queries": [], "attention": []}
    submit = TransferEngine.submit

    def noted(self: TransferEngine, *arguments: Any, kind: str, **more: Any) -> Transfer:
        if kind in copies:
            mine = [each for each in more["after"] if each in events]
            copies[kind].append((events.index(mine[-1]), len(events)) if mine else None)
        return submit(self, *arguments, kind=kind, **more)

    monkeypatch.setattr(EmulatedBackend, "record", record)
    monkeypatch.setattr(TransferEngine, "submit", noted)
    run(tiny_llama_dir, PROMPTS[:4], 4, **settings("host=100", "host"))
    assert len(copies["queries"]) == len(copies["attention"]) > 0
    for number, newest in copies["attention"]:
        assert number == newest - 1, "recorded in this very call"
    assert copies["attention"] == copies["queries"]


def test_weights_that_are_expanded(tmp_path, tiny_llama_dir, monkeypatch):
    """There is room for one layer in the computed type: breaks end with the layer."""
    monkeypatch.setattr("policy_search.machine.multiplies_bfloat16", lambda: False)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    model.bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    done = run(tmp_path, PROMPTS, NEW_TOKENS, **settings("host=100", "host", dtype="auto"))
    assert done.tokens == greedy_tokens(tmp_path, PROMPTS, NEW_TOKENS, [0])


def test_bytes_are_those_of_rows_not_of_pages(tiny_llama_dir):
    """Pages of decoding rows do not move; queries, new keys and values and results do."""
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **settings("host=100", "host"))
    kinds, rows = done.summary["bytes_by_kind"], len(single_rows(done))
    spans = [span for plan in done.plans for batch in plan.micro_batches for span in batch.spans]
    token = LAYERS * 2 * KV_HEADS * DIM * 4
    assert kinds["device->host"]["queries"] == rows * (LAYERS * HEADS * DIM * 4 + token)
    assert kinds["host->device"]["attention"] == rows * LAYERS * HEADS * (DIM + 1) * 4
    others = [span for span in spans if span.length > 1]
    assert kinds["device->host"]["kv"] == sum(span.length for span in others) * token
    page = 32  # tokens; what chunks of prompts had before them still moves
    moved = sum(-(-span.start // page) * page for span in others) * token
    assert kinds["host->device"].get("kv", 0) == moved
    read = sum(-(-span.end // page) * page for span in single_rows(done)) * token
    assert kinds["host attention"]["kv"] == read


def test_auto_splits_pages_between_two_that_are_as_fast(tiny_llama_dir, reference, monkeypatch):
    """A processor that attends at the link's speed gets half of the pages."""
    speed = AttentionSpeed(5e7, contention=0.0)
    monkeypatch.setattr("flexrun.host_attention.HostAttention.measure", lambda *_: speed)
    more = {"weights": "device=100", "emulate": "host-to-device=50MB/s"}
    with LLM(tiny_llama_dir, **settings("host=100", "auto", **more)) as llm:
        split = engine_of(llm)._runtime._split
        done = generate(llm, PROMPTS, NEW_TOKENS)
        assert split.hardware is not None
        share = 5e7 / (5e7 + split.hardware.host_to_device)
    assert done.tokens == reference
    assert 0.4 < share < 0.6
    on_host = done.summary["bytes_by_kind"]["host attention"]["kv"]
    single = sum(-(-span.end // 32) * 32 for span in single_rows(done))
    total = single * LAYERS * 2 * KV_HEADS * DIM * 4
    assert abs(on_host / total - share) < 0.15


@pytest.mark.parametrize("seed", range(3))
def test_any_share_in_any_sweep(tiny_llama_dir, reference, monkeypatch, seed):
    """Rows change sides from sweep to sweep; now and then all of them are on one."""
    draw = random.Random(seed)
    monkeypatch.setattr(
        "flexrun.attention_split.best_host_share", lambda *_: draw.choice([0.0, 0.3, 0.7, 1.0])
    )
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **settings("host=100", "auto"))
    assert done.tokens == reference


@pytest.mark.parametrize("fails", [0, 5])
def test_what_goes_wrong_there_is_said_here(tiny_llama_dir, monkeypatch, fails):
    """An error of the processor's ends the run, and everything is given back."""
    attend, calls = CpuAttention.attend, [0]

    def broken(self: CpuAttention, *arguments: Any) -> Any:
        if threading.current_thread().name.startswith("flexrun host attention"):
            calls[0] += 1
            if calls[0] > fails:
                raise MemoryError("attention ran out of memory for its sums")
        return attend(self, *arguments)

    monkeypatch.setattr(CpuAttention, "attend", broken)
    before = threading.active_count()
    llm = LLM(tiny_llama_dir, **settings("host=100", "host"))
    account = engine_of(llm)._runtime.backend.account
    with pytest.raises(MemoryError, match="for its sums"):
        generate(llm, PROMPTS, NEW_TOKENS)
    llm.close()
    assert set(account.used.values()) == {0}
    assert threading.active_count() == before
