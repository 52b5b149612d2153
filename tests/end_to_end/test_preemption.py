"""A sequence that gives its pages away, in either way, generates the same tokens."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flexrun import LLM, kv_setup
from flexrun.plan import SweepPlan
from offload.tiers import Tier
from tests.end_to_end.harness import Run, engine_of, generate
from tests.end_to_end.reference import greedy_tokens, ragged_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [list(text.encode()) for text in ragged_prompts(10, longest=7)]
NEW_TOKENS = 60
PAGES = 16
"""For five sequences of up to four pages, too few."""


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> list[list[int]]:
    return greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])


def settings(device: str, **more: Any) -> dict[str, Any]:
    cut = {"micro_batch_rows": 40, "max_rows": 120, "max_sequences": 6, "num_micro_batches": 2}
    common = {"device": device, "weights": "device=50,disk=50", "dtype": "float32"}
    return common | cut | {"kv_cache": "device=100"} | more


@pytest.fixture
def few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {Tier.DEVICE: PAGES, Tier.HOST: 0, Tier.DISK: 0}
    monkeypatch.setattr(kv_setup, "kv_pages", lambda *_: dict(pages))


def preempt_at_random(llm: LLM, draw: random.Random, modes: list[bool]) -> None:
    """Before some sweeps one or two of the running sequences have to give their pages away."""
    scheduler = engine_of(llm)._runtime.scheduler
    next_sweep = scheduler.next_sweep

    def broken_into(drafts: Mapping[int, int] | None = None) -> SweepPlan:
        for _ in range(draw.choice([0, 0, 1, 2])):
            if len(scheduler.running) > 1:
                victim = draw.choice(list(scheduler.running))
                scheduler.preempt(victim, swap=draw.choice(modes))
        return next_sweep(drafts)

    scheduler.next_sweep = broken_into  # type: ignore[method-assign]


@pytest.mark.usefixtures("few_pages")
@pytest.mark.parametrize("modes", [[True], [False], [True, False]], ids=["swap", "again", "both"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_tokens_are_those_of_transformers(tiny_llama_dir, reference, device, modes):
    """With sequences preempted at random sweeps, in each way and in both."""
    with LLM(tiny_llama_dir, **settings(device)) as llm:
        preempt_at_random(llm, random.Random(0), modes)
        result = generate(llm, PROMPTS, NEW_TOKENS)
    assert result.tokens == reference
    assert result.summary["preemptions"] > 10
    swaps = result.summary["swaps"]
    assert swaps > 5 if True in modes else swaps == 0


def run(directory: Path, device: str, **more: Any) -> Run:
    with LLM(directory, **settings(device, **more)) as llm:
        return generate(llm, PROMPTS, NEW_TOKENS)


@pytest.mark.usefixtures("few_pages")
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_pages_move_before_they_run_out(tiny_llama_dir, reference, device):
    """The bytes that left are those of the pages that moved, and fewer rows are computed again."""
    swapped = run(tiny_llama_dir, device, preemption="swap")
    again = run(tiny_llama_dir, device, preemption="recompute")
    assert swapped.tokens == again.tokens == reference
    assert swapped.summary["swaps"] > 0
    assert again.summary["swaps"] == 0
    assert again.summary["preemptions"] > 0
    assert swapped.summary["rows"] < again.summary["rows"]
    link = "host->disk" if device == "cpu" else "device->host"
    assert swapped.summary["bytes_by_kind"][link]["kv"] > 0
    assert "kv" not in again.summary["bytes_by_kind"].get(link, {})


def test_nothing_is_kept_free_where_nobody_has_to_wait(tiny_llama_dir):
    """With pages for all sequences there is no swap tier, and no file."""
    with LLM(tiny_llama_dir, **settings("cpu", max_sequences=2)) as llm:
        assert engine_of(llm)._runtime.pools.swap is None
