"""Guessed tokens change how many sweeps a job takes, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexrun import LLM, SamplingParams, calibration
from flexrun.engine import Engine
from policy_search.sweep_cost import SweepCost
from tests.end_to_end.harness import Run, engine_of, generate
from tests.end_to_end.reference import greedy_tokens, ragged_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 24
TEXTS = [list(text.encode()) for text in ragged_prompts(9, longest=7)]
PROMPTS = [tokens * 2 for tokens in TEXTS]
"""Each twice, so that what follows its first tokens has been there before."""
KV_SPLITS = ("device=100", "host=100", "disk=100", "device=40,host=30,disk=30")


class Oracle:
    """Guesses that are right for a while, from tokens known before, and then wrong."""

    known: list[list[int]]

    def __init__(self) -> None:
        self._count = 0

    def propose(self, tokens: list[int]) -> list[int]:
        self._count += 1
        found = next((k for k in self.known if k[: len(tokens)] == list(tokens)), [])
        follow = found[len(tokens) : len(tokens) + 6]
        if self._count % 3 == 0 and len(follow) > 2:
            follow[2] = (follow[2] + 1) % 256
        return follow

    def learn(self, drafted: int, accepted: int) -> None:
        pass


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> list[list[int]]:
    return greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])


@pytest.fixture
def free_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as anyone could want: what is measured depends on the machine."""
    monkeypatch.setattr(calibration, "free_rows", lambda *_: 1000)
    monkeypatch.setattr(SweepCost, "rows_within", lambda *_: 1000)
    monkeypatch.setattr(calibration.RowBudget, "learn", lambda *_: None)


def settings(device: str, kv_cache: str, **more: Any) -> dict[str, Any]:
    cut = {"micro_batch_rows": 40, "max_rows": 120, "max_sequences": 6, "num_micro_batches": 3}
    common = {"device": device, "weights": "device=50,disk=50", "dtype": "float32"}
    return common | cut | {"kv_cache": kv_cache} | more


@pytest.mark.usefixtures("free_rows")
@pytest.mark.parametrize("kv_cache", KV_SPLITS)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("attention", ["device", "host"])
def test_greedy_tokens_are_those_of_transformers(
    tiny_llama_dir, reference, monkeypatch, device, kv_cache, attention
):
    """Right guesses and wrong ones, wherever keys and values of both lie."""
    if device == "cpu" and attention == "host":
        pytest.skip("HOST is the device's memory")
    monkeypatch.setattr(Oracle, "known", [p + t for p, t in zip(PROMPTS, reference)], raising=False)
    monkeypatch.setattr("flexrun.sequence.PromptLookup", Oracle)
    with LLM(tiny_llama_dir, **settings(device, kv_cache, attention=attention)) as llm:
        result = generate(llm, PROMPTS, NEW_TOKENS)
    assert result.tokens == reference
    drafted, accepted = result.summary["drafted_tokens"], result.summary["accepted_tokens"]
    if kv_cache == "host=100" and attention == "host":
        assert drafted == 0, "rows that attend on HOST come one by one"
    else:
        assert 0 < accepted < drafted


def run(directory: Path, **more: Any) -> Run:
    with LLM(directory, **settings("cpu", "device=100", **more)) as llm:
        return generate(llm, PROMPTS, NEW_TOKENS)


@pytest.mark.usefixtures("free_rows")
def test_it_can_be_turned_off(tiny_llama_dir, reference):
    with_guesses, without = run(tiny_llama_dir), run(tiny_llama_dir, speculation="off")
    assert with_guesses.tokens == without.tokens == reference
    assert without.summary["drafted_tokens"] == 0
    assert with_guesses.summary["sweeps"] <= without.summary["sweeps"]


def test_nothing_is_guessed_where_rows_cost_time(tiny_llama_dir):
    """Without weights on their way no row is free."""
    with LLM(tiny_llama_dir, device="cpu", weights="device=100", dtype="float32") as llm:
        assert generate(llm, PROMPTS, NEW_TOKENS).summary["drafted_tokens"] == 0


@pytest.mark.usefixtures("free_rows")
@pytest.mark.parametrize("seed", [1, 2])
def test_sampled_tokens_are_the_same(tiny_llama_dir, seed):
    """Any parameters, several completions, stop tokens and min_tokens: token by token."""
    params = [
        SamplingParams(temperature=0.5, top_p=0.8, n=3, seed=seed, max_tokens=NEW_TOKENS),
        SamplingParams(temperature=0.3, min_tokens=7, stop_token_ids=tuple(range(40, 90))),
        SamplingParams(temperature=0.1, top_k=2, max_tokens=NEW_TOKENS, seed=5, ignore_eos=True),
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    each = [params[number % 3] for number in range(len(prompts))]
    found = []
    for speculation in ("off", "lookup"):
        with LLM(tiny_llama_dir, **settings("cpu", "device=100", speculation=speculation)) as llm:
            outputs = llm.generate(prompts, each, use_tqdm=False)
            found.append([[(c.token_ids, c.finish_reason) for c in o.outputs] for o in outputs])
            summary = llm.summary()
    assert found[0] == found[1]
    assert summary["accepted_tokens"] > 0


@pytest.mark.usefixtures("free_rows")
def test_a_wrong_guess_that_gives_no_numbers_does_no_harm(tiny_llama_dir, reference, monkeypatch):
    """Its pages are erased, its sequence is computed again, and no request fails."""
    monkeypatch.setattr(Oracle, "known", [p + t for p, t in zip(PROMPTS, reference)], raising=False)
    monkeypatch.setattr("flexrun.sequence.PromptLookup", Oracle)
    choose = Engine._choose
    broken: list[int] = []

    def with_nan(self: Engine, numbers: list[int], logits: torch.Tensor) -> torch.Tensor:
        chosen = choose(self, numbers, logits)
        last = len(numbers) - 1 - numbers[::-1].index(numbers[0])
        drafter = self._sequences[numbers[0]].drafter
        assert isinstance(drafter, Oracle)
        if last >= 4 and len(broken) < 3 and drafter._count % 3 == 0:  # its third guess is wrong
            broken.append(numbers[0])
            chosen[last] = -1
        return chosen

    monkeypatch.setattr(Engine, "_choose", with_nan)
    with LLM(tiny_llama_dir, **settings("cpu", "device=100")) as llm:
        result = generate(llm, PROMPTS, NEW_TOKENS)
        assert engine_of(llm)._runtime.scheduler.preemption.count == len(broken) == 3
    assert result.tokens == reference


@pytest.mark.usefixtures("free_rows")
def test_guesses_after_the_end_do_not_count(tiny_llama_dir, reference, monkeypatch):
    """A sequence that ends with its third right guess had three, however many were right."""
    known = [p + t for p, t in zip(PROMPTS, reference)]
    monkeypatch.setattr(Oracle, "known", known, raising=False)
    monkeypatch.setattr("flexrun.sequence.PromptLookup", Oracle)
    which = next(n for n, tokens in enumerate(reference) if tokens[3] not in tokens[:3])
    stop = reference[which][3]
    with LLM(tiny_llama_dir, **settings("cpu", "device=100")) as llm:
        result = generate(llm, PROMPTS[which : which + 1], NEW_TOKENS, stop_token_ids=(stop,))
    assert result.tokens == [reference[which][:4]]
    counted = [result.summary[f"{kind}_tokens"] for kind in ("generated", "accepted", "drafted")]
    assert counted == [4, 3, 6]
