"""Any policy gives the greedy tokens of transformers: placements, devices, schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexrun import LLM, kv_setup
from offload.pages import PagePools
from offload.tiers import HOSTED_TURNS, Split, Tier
from policy_search.kv_memory import broken_off_bytes, hosted_row_bytes, hosted_rows
from policy_search.memory import workspace
from policy_search.policy import Policy
from tests.end_to_end.harness import SPLITS, engine_of, generate, run
from tests.end_to_end.reference import greedy_tokens, ragged_prompts
from tests.end_to_end.test_bytes import disk_padding, placeable

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 6
TINY_PROMPTS = [list(text.encode()) for text in ragged_prompts(16, longest=7)]
KV_SPLITS = ("device=100", "host=100", "device=50,host=50", "disk=100", "device=40,host=30,disk=30")
KIB = 1024


@pytest.fixture(scope="module")
def tiny_reference(tiny_llama_dir) -> list[list[int]]:
    """What transformers generates for `TINY_PROMPTS`."""
    return greedy_tokens(tiny_llama_dir, TINY_PROMPTS, NEW_TOKENS, [0])


def cut(micro_batches: int) -> dict[str, int]:
    """Sweeps of one micro-batch, or of at least this many where there are enough rows."""
    return {"num_micro_batches": micro_batches, "micro_batch_rows": 48 // micro_batches}


BATCH = {"micro_batch_rows": 48, "max_rows": 48, "max_sequences": 10}


class Tiny:
    """Settings of the tiny Llama on devices that are too small for it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with LLM(directory, device="cpu", weights="device=100", kv_cache="device=100") as llm:
            self.shape = engine_of(llm)._runtime.shape

    def room(self, weights: str) -> int:
        """DEVICE bytes for weights and KV: less than the weights, if none has to be there."""
        more = int(340 * KIB * Split.parse(weights).fraction(Tier.DEVICE))
        return self.shape.weight_bytes - 20 * KIB + more

    def capacity(self, weights: str, **batch: int) -> int:
        """DEVICE bytes with those for activations, which grow with the batch.

        What is read of a disk besides weights, to have whole blocks, takes working memory as well.
        """
        padding = disk_padding(self.directory, placeable(self.directory, 4), weights)
        ring = 2 * max(padding[layer] for layer in range(4)) + padding[4]
        activations = workspace(self.shape, Policy(**batch))  # type: ignore[arg-type]
        return self.room(weights) + ring + activations

    def hosted(self, **batch: int) -> int:
        """DEVICE bytes of rows that attend to pages on HOST there."""
        policy = Policy(kv_cache=Split(host=100), **batch)  # type: ignore[arg-type]
        rows = HOSTED_TURNS * hosted_rows(policy, unified=False)
        there = hosted_row_bytes(self.shape)[Tier.DEVICE]
        return rows * there + broken_off_bytes(self.shape, policy)

    def settings(self, device: str, weights: str, kv_cache: str, **changed: int) -> dict[str, Any]:
        """Ten of the sixteen prompts run at a time, in 48 rows a sweep, unless `changed`."""
        batch = BATCH | changed
        common: dict[str, Any] = {"device": device, "weights": weights, "kv_cache": kv_cache}
        common["dtype"] = "float32"
        if device == "emulated":
            hosted = self.hosted(**batch) if "host" in kv_cache else 0
            common["emulate"] = f"capacity={self.capacity(weights, **batch) + hosted}"
            # A third layer on its way would take the room of KV pages.
            common["policy"] = Policy(prefetch_depth=2)
        return common | batch


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir) -> Tiny:
    return Tiny(tiny_llama_dir)


def test_the_prompts_tell_sequences_apart(tiny_reference):
    """Prompts and completions are ragged and distinct, so a mix-up cannot go unnoticed."""
    assert len({len(prompt) for prompt in TINY_PROMPTS}) > 8
    assert len({tuple(tokens) for tokens in tiny_reference}) == len(TINY_PROMPTS)
    assert {len(tokens) for tokens in tiny_reference} != {NEW_TOKENS}, "none ends early"


def test_the_emulated_device_is_too_small(tiny):
    """Weights and KV pages of ten sequences exceed what any emulated device here has for them."""
    longest = sorted(len(prompt) + NEW_TOKENS for prompt in TINY_PROMPTS)[-10:]
    kv = sum(-(-tokens // 16) * 16 * tiny.shape.kv_token_bytes for tokens in longest)
    assert tiny.room("device=100") < tiny.shape.weight_bytes + kv
    assert tiny.room("host=100") < tiny.shape.weight_bytes


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("kv_cache", KV_SPLITS)
@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_every_placement(
    tiny_llama_dir, tiny, tiny_reference, device, weights, kv_cache, micro_batches, overlap
):
    """Wherever weights and KV live, however sweeps are cut, overlapped or not: the same tokens."""
    settings = tiny.settings(device, weights, kv_cache, **cut(micro_batches))
    done = run(tiny_llama_dir, TINY_PROMPTS, NEW_TOKENS, overlap=overlap, **settings)
    assert done.tokens == tiny_reference
    assert max(done.micro_batches) >= micro_batches
    if micro_batches == 1 and kv_cache == "device=100":
        assert set(done.micro_batches) == {1}


@pytest.mark.parametrize("kv_cache", KV_SPLITS)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_prompts_in_chunks(tiny_llama_dir, tiny, tiny_reference, device, kv_cache):
    """Prompts computed in chunks over several sweeps, beside decodes, give the same tokens."""
    chunks = {"max_rows": 17, "micro_batch_rows": 7}
    settings = tiny.settings(device, "host=50,disk=50", kv_cache, **chunks)
    done = run(tiny_llama_dir, TINY_PROMPTS, NEW_TOKENS, **settings)
    assert done.tokens == tiny_reference
    spans = [span for plan in done.plans for batch in plan.micro_batches for span in batch.spans]
    assert {span.sequence for span in spans if not span.wants_logits} == set(range(16))
    assert max(done.micro_batches) >= 3
    mixed = [
        plan
        for plan in done.plans
        if {1, 7} <= {span.length for batch in plan.micro_batches for span in batch.spans}
    ]
    assert mixed, "no sweep had decodes and a chunk"


@pytest.mark.parametrize("kv_cache", KV_SPLITS)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_sequences_join_as_others_leave(tiny_llama_dir, tiny, tiny_reference, device, kv_cache):
    """With three places for sixteen prompts, each joins when one leaves: the same tokens."""
    few = cut(2) | {"max_sequences": 3}
    settings = tiny.settings(device, "device=25,host=50,disk=25", kv_cache, **few)
    done = run(tiny_llama_dir, TINY_PROMPTS, NEW_TOKENS, **settings)
    assert done.tokens == tiny_reference
    joined = [
        {span.sequence for batch in plan.micro_batches for span in batch.spans if span.start == 0}
        for plan in done.plans
    ]
    assert len([sequences for sequences in joined if sequences]) >= 5
    assert max(len(sequences) for sequences in joined) <= 3
    assert max(done.micro_batches) >= 2


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_pages_are_used_again(tiny_llama_dir, tiny, device):
    """Many more tokens than the KV cache holds pass through it without a trace of earlier ones."""
    prompts = [list(text.encode()) for text in ragged_prompts(60, seed=1, longest=7)]
    many = cut(3) | {"max_sequences": 60}
    settings = tiny.settings(device, "device=50,host=50", "device=50,host=50", **many)
    limit = tiny.capacity("device=50,host=50", max_rows=48, **many)
    settings["device_memory"] = limit + tiny.hosted(max_rows=48, **many) * (device != "cpu")
    with LLM(tiny_llama_dir, **settings) as llm:
        pools = engine_of(llm)._runtime.pools
        room = sum(pools.capacity.values()) * pools.page_tokens
        done = generate(llm, prompts, 6)
    assert done.tokens == greedy_tokens(tiny_llama_dir, prompts, 6, [0])
    assert sum(len(prompt) for prompt in prompts) > 2 * room


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_tokens_are_the_same_when_pages_run_out(tiny_llama_dir, tiny, device, monkeypatch):
    """Sequences whose pages lie on three tiers, and are taken away, go on with the same tokens."""
    pages = {Tier.DEVICE: 4, Tier.HOST: 3, Tier.DISK: 3}
    monkeypatch.setattr(kv_setup, "kv_pages", lambda *_: pages)
    prompts = [list(text.encode()) for text in ragged_prompts(12, seed=2, longest=6)]
    settings = tiny.settings(device, "device=50,host=50", "device=40,host=30,disk=30", **cut(3))
    settings["policy"] = Policy(page_tokens=8, prefetch_depth=2)
    with LLM(tiny_llama_dir, **settings) as llm:
        pools = engine_of(llm)._runtime.pools
        allocate, seen = pools.allocate, set()

        def noted(sequence: int, tokens: int) -> bool:
            done = allocate(sequence, tokens)
            if sequence in pools.tables:
                seen.add(frozenset(page.tier for page in pools.tables[sequence].pages))
            return done

        monkeypatch.setattr(PagePools, "allocate", lambda _, *call: noted(*call))
        done = generate(llm, prompts, 24)
    assert done.tokens == greedy_tokens(tiny_llama_dir, prompts, 24, [0])
    assert done.summary["preemptions"] > 0
    assert frozenset(pages) in seen
    assert max(done.micro_batches) >= 2


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("weights", ["device=100", "host=100", "disk=100"])
def test_one_token_at_either_end(tiny_llama_dir, tiny, device, weights):
    """Prompts of one token, and completions of one token, are exact."""
    prompts = [[token] for token in range(40, 60)]
    settings = tiny.settings(device, weights, "device=100", **cut(3))
    for new_tokens in (1, 5):
        done = run(tiny_llama_dir, prompts, new_tokens, **settings)
        assert done.tokens == greedy_tokens(tiny_llama_dir, prompts, new_tokens, [0])


@pytest.mark.parametrize("weights", ["device=100", "host=100", "disk=100", "device=30,host=70"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_tied_embedding(tiny_tied_llama_dir, tiny, device, weights):
    """One matrix that is embedding and output head serves as both from any tier."""
    settings = tiny.settings(device, weights, "device=50,host=50", **cut(3))
    done = run(tiny_tied_llama_dir, TINY_PROMPTS, NEW_TOKENS, **settings)
    assert done.tokens == greedy_tokens(tiny_tied_llama_dir, TINY_PROMPTS, NEW_TOKENS, [0])
    assert max(done.micro_batches) >= 3


@pytest.mark.parametrize("kv_cache", ["host=100", "disk=100"])
def test_long_texts_through_small_staging(tiny_llama_dir, tiny, kv_cache):
    """Texts away are exact although the device's staging holds only one of them at a time."""
    settings = tiny.settings("emulated", "host=100", kv_cache)
    settings["emulate"] = f"capacity={tiny.capacity('host=100', **BATCH)}"
    with LLM(tiny_llama_dir, attention="device", **settings) as llm:
        pools = engine_of(llm)._runtime.pools
        (staging,) = pools.largest_table.values()
        lengths = (pools.page_tokens * staging - 50, pools.page_tokens * staging - 30)
        prompts = [[(7 * i + length) % 255 + 1 for i in range(length)] for length in lengths]
        done = generate(llm, prompts, 20)
    assert staging < 40
    assert done.tokens == greedy_tokens(tiny_llama_dir, prompts, 20, [0])
    assert max(done.micro_batches) == 2
