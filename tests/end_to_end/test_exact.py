"""Any policy gives the greedy tokens of transformers: placements, devices, schedules."""

from __future__ import annotations

from typing import Any

import pytest

from flexrun import LLM
from tests.end_to_end.harness import SPLITS, engine_of, generate, run
from tests.end_to_end.reference import greedy_tokens, ragged_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 8
TINY_PROMPTS = [list(text.encode()) for text in ragged_prompts(16, longest=7)]
KV_SPLITS = ("device=100", "host=100", "device=50,host=50")
CAPACITY = {"device=100": "1100KiB"}
"""Of the emulated device, where it is not the `SMALL` one."""
SMALL = "900KiB"


@pytest.fixture(scope="module")
def tiny_reference(tiny_llama_dir) -> list[list[int]]:
    """What transformers generates for `TINY_PROMPTS`."""
    return greedy_tokens(tiny_llama_dir, TINY_PROMPTS, NEW_TOKENS, [0])


def tiny_settings(
    device: str, weights: str = "device=100", kv_cache: str = "device=100"
) -> dict[str, Any]:
    """Ten of the sixteen prompts run at a time; the emulated device cannot hold model and KV."""
    settings = {"device": device, "weights": weights, "kv_cache": kv_cache}
    if device == "emulated":
        settings["emulate"] = f"capacity={CAPACITY.get(weights, SMALL)}"
    return settings | {"dtype": "float32", "max_rows": 48, "max_sequences": 10}


def cut(micro_batches: int) -> dict[str, int]:
    """Sweeps of one micro-batch, or of at least this many where there are enough rows."""
    return {"num_micro_batches": micro_batches, "micro_batch_rows": 48 // micro_batches}


def test_the_prompts_tell_sequences_apart(tiny_reference):
    """Prompts and completions are ragged and distinct, so a mix-up cannot go unnoticed."""
    assert len({len(prompt) for prompt in TINY_PROMPTS}) > 8
    assert len({tuple(tokens) for tokens in tiny_reference}) == len(TINY_PROMPTS)
    assert {len(tokens) for tokens in tiny_reference} != {NEW_TOKENS}, "none ends early"


def test_the_emulated_device_is_too_small(tiny_llama_dir):
    """With all on DEVICE, KV pages of ten sequences included, either capacity is exceeded."""
    settings = tiny_settings("emulated") | cut(1) | {"emulate": "capacity=1GiB"}
    with LLM(tiny_llama_dir, **settings) as llm:
        weights = engine_of(llm)._runtime.shape.weight_bytes
        token_bytes = engine_of(llm)._runtime.shape.kv_token_bytes
    longest = sorted(len(prompt) + NEW_TOKENS for prompt in TINY_PROMPTS)[-10:]
    needed = weights + sum(-(-tokens // 16) * 16 * token_bytes for tokens in longest)
    assert needed > 1100 * 1024


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("kv_cache", KV_SPLITS)
@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_every_placement(
    tiny_llama_dir, tiny_reference, device, weights, kv_cache, micro_batches, overlap
):
    """Wherever weights and KV live, however sweeps are cut, overlapped or not: the same tokens."""
    settings = tiny_settings(device, weights, kv_cache) | cut(micro_batches)
    done = run(tiny_llama_dir, TINY_PROMPTS, NEW_TOKENS, overlap=overlap, **settings)
    assert done.tokens == tiny_reference
    assert max(done.micro_batches) >= micro_batches
    if micro_batches == 1 and kv_cache == "device=100":
        assert set(done.micro_batches) == {1}
    if device == "emulated":
        peak = done.summary["peak_bytes"]["device"]
        assert peak <= (1100 if weights == "device=100" else 900) * 1024


@pytest.mark.parametrize("kv_cache", KV_SPLITS)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_prompts_in_chunks(tiny_llama_dir, tiny_reference, device, kv_cache):
    """Prompts computed in chunks over several sweeps, beside decodes, give the same tokens."""
    settings = tiny_settings(device, "host=50,disk=50", kv_cache)
    settings |= {"max_rows": 17, "micro_batch_rows": 7}
    done = run(tiny_llama_dir, TINY_PROMPTS, NEW_TOKENS, **settings)
    assert done.tokens == tiny_reference
    spans = [span for plan in done.plans for batch in plan.micro_batches for span in batch.spans]
    chunks = [span for span in spans if not span.wants_logits]
    assert {span.sequence for span in chunks} == set(range(16))
    assert max(done.micro_batches) >= 3
    mixed = [
        plan
        for plan in done.plans
        if {1, 7} <= {span.length for batch in plan.micro_batches for span in batch.spans}
    ]
    assert mixed, "no sweep had decodes and a chunk"


@pytest.mark.parametrize("kv_cache", KV_SPLITS)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_sequences_join_as_others_leave(tiny_llama_dir, tiny_reference, device, kv_cache):
    """With three places for sixteen prompts, each joins when one leaves: the same tokens."""
    settings = tiny_settings(device, "device=25,host=50,disk=25", kv_cache)
    settings |= cut(2) | {"max_sequences": 3}
    done = run(tiny_llama_dir, TINY_PROMPTS, NEW_TOKENS, **settings)
    assert done.tokens == tiny_reference
    joined = [
        {span.sequence for batch in plan.micro_batches for span in batch.spans if span.start == 0}
        for plan in done.plans
    ]
    assert len([sequences for sequences in joined if sequences]) >= 5
    assert max(len(sequences) for sequences in joined) <= 3
    assert max(done.micro_batches) == 2


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_pages_are_used_again(tiny_llama_dir, device):
    """Many more tokens than the KV cache holds pass through it without a trace of earlier ones."""
    prompts = [list(text.encode()) for text in ragged_prompts(60, seed=1, longest=7)]
    settings = tiny_settings(device, "device=50,host=50", "device=50,host=50")
    settings |= cut(3) | {"max_sequences": 60, "device_memory": "900KiB"}
    with LLM(tiny_llama_dir, **settings) as llm:
        pools = engine_of(llm)._runtime.pools
        room = sum(pools.capacity.values()) * pools.page_tokens
        done = generate(llm, prompts, 6)
    assert done.tokens == greedy_tokens(tiny_llama_dir, prompts, 6, [0])
    assert sum(len(prompt) for prompt in prompts) > 2 * room


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("weights", ["device=100", "host=100", "disk=100"])
def test_one_token_at_either_end(tiny_llama_dir, device, weights):
    """Prompts of one token, and completions of one token, are exact."""
    prompts = [[token] for token in range(40, 60)]
    for new_tokens in (1, 5):
        done = run(tiny_llama_dir, prompts, new_tokens, **tiny_settings(device, weights) | cut(3))
        assert done.tokens == greedy_tokens(tiny_llama_dir, prompts, new_tokens, [0])


@pytest.mark.parametrize("weights", ["device=100", "host=100", "disk=100", "device=30,host=70"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_tied_embedding(tiny_tied_llama_dir, device, weights):
    """One matrix that is embedding and output head serves as both from any tier."""
    settings = tiny_settings(device, weights, "device=50,host=50") | cut(3)
    done = run(tiny_tied_llama_dir, TINY_PROMPTS, NEW_TOKENS, **settings)
    assert done.tokens == greedy_tokens(tiny_tied_llama_dir, TINY_PROMPTS, NEW_TOKENS, [0])
    assert max(done.micro_batches) >= 3


def test_long_texts_through_small_staging(tiny_llama_dir):
    """Texts on HOST are exact although the device's staging holds only one of them at a time."""
    prompts = [
        [(7 * i + k) % 255 + 1 for i in range(length)] for k, length in enumerate((280, 330))
    ]
    settings = tiny_settings("emulated", "host=100", "host=100") | cut(1)
    with LLM(tiny_llama_dir, **settings) as llm:
        (staging,) = engine_of(llm)._runtime.pools.largest_table.values()
        done = generate(llm, prompts, 20)
    assert done.tokens == greedy_tokens(tiny_llama_dir, prompts, 20, [0])
    pages = [len(prompt) // 16 for prompt in prompts]
    assert max(pages) <= staging < sum(pages)
    assert max(done.micro_batches) == 2
