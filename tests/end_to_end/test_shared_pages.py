"""Completions of one prompt share its pages; pages move up when there is room: the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

from flexrun import LLM, SamplingParams, kv_setup
from offload.tiers import Tier
from policy_search.policy import Policy
from tests.end_to_end.harness import engine_of, record_plans
from tests.end_to_end.reference import greedy_tokens, ragged_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [list(text.encode()) for text in ragged_prompts(6, longest=8)]
SAMPLES, NEW_TOKENS = 4, 12
SPLITS = ["device=100", "host=100", "disk=100", "device=40,host=30,disk=30"]


def complete(model: Any, params: SamplingParams, **settings: Any) -> tuple[list[Any], Any, Any]:
    """Tokens of every completion, the plans of all sweeps, and the summary."""
    common = {"dtype": "float32", "weights": "device=50,disk=50", "policy": Policy(page_tokens=8)}
    cut = {"max_rows": 36, "num_micro_batches": 3, "micro_batch_rows": 12, "max_sequences": 10}
    with LLM(model, **common | cut | settings) as llm:
        plans = record_plans(engine_of(llm))
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False
        )
        tokens = [[list(each.token_ids) for each in output.outputs] for output in outputs]
        return tokens, plans, llm.summary()


@pytest.mark.parametrize("kv_cache", SPLITS)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_completions_share_their_prompt(tiny_llama_dir, device, kv_cache):
    """Drawn at random, so that they differ: as when each has a prompt of its own."""
    params = SamplingParams(
        temperature=1.0, seed=7, n=SAMPLES, max_tokens=NEW_TOKENS, ignore_eos=True
    )
    settings = {"device": device, "kv_cache": kv_cache}
    together, plans, _ = complete(tiny_llama_dir, params, **settings)
    apart, _, _ = complete(tiny_llama_dir, params, **settings, max_sequences=1)
    assert together == apart
    assert all(len({tuple(each) for each in many}) == SAMPLES for many in together)
    spans = [span for plan in plans for batch in plan.micro_batches for span in batch.spans]
    prompts = [span for span in spans if span.start == 0]
    assert len(prompts) == len(PROMPTS), "a prompt was computed again"
    rows = sum(map(len, PROMPTS)) + len(PROMPTS) * (SAMPLES - 1)
    assert sum(s.length for s in spans) == rows + len(PROMPTS) * SAMPLES * (NEW_TOKENS - 1)


def test_greedy_completions_are_transformers(tiny_llama_dir):
    params = SamplingParams(temperature=0, n=3, max_tokens=NEW_TOKENS)
    found, _, _ = complete(tiny_llama_dir, params, device="emulated", kv_cache=SPLITS[-1])
    expected = greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])
    assert found == [[tokens] * 3 for tokens in expected]


@pytest.mark.parametrize("attention", ["device", "host"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_pages_move_up_when_nothing_waits(tiny_llama_dir, device, attention, monkeypatch):
    """And when they run out, as well: sequences on three tiers, forks and preemptions."""
    pages = {Tier.DEVICE: 16, Tier.HOST: 8, Tier.DISK: 8}
    monkeypatch.setattr(kv_setup, "kv_pages", lambda *_: pages)
    params = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=24)
    settings = {"device": device, "kv_cache": SPLITS[-1], "attention": attention}
    found, plans, summary = complete(tiny_llama_dir, params, **settings)
    assert summary["promotions"] > 0
    assert max(len(plan.micro_batches) for plan in plans) >= 3
    monkeypatch.undo()
    alone = {"device": "cpu", "kv_cache": "device=100", "max_sequences": 1}
    assert found == complete(tiny_llama_dir, params, **alone)[0]
