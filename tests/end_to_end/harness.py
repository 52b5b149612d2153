"""Runs a model for a test and takes notes: its tokens, every sweep's plan, the summary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers

from flexrun import LLM, SamplingParams
from flexrun.engine import Engine
from flexrun.plan import SweepPlan
from flexrun.tokenizer import Tokenizer, end_token_ids
from tests.end_to_end.reference import greedy_tokens

SPLITS = (
    "device=100",
    "host=100",
    "disk=100",
    "device=50,host=50",
    "device=50,disk=50",
    "host=50,disk=50",
    "device=25,host=50,disk=25",
)
"""Weights on each tier alone, on every two, and on all three."""


@dataclass(frozen=True)
class Run:
    """What one run did."""

    tokens: list[list[int]]
    """Of every prompt, in order."""
    plans: list[SweepPlan]
    """Of every sweep that computed something."""
    summary: dict[str, Any]

    @property
    def micro_batches(self) -> list[int]:
        """Micro-batches of every sweep."""
        return [len(plan.micro_batches) for plan in self.plans]


def engine_of(llm: LLM) -> Engine:
    """The engine inside, for what is not public."""
    engine = llm._engine
    assert isinstance(engine, Engine)
    return engine


def record_plans(engine: Engine) -> list[SweepPlan]:
    """A list that the plan of every sweep from now on is added to."""
    scheduler, plans = engine._runtime.scheduler, []
    next_sweep = scheduler.next_sweep

    def recorded(drafts: Mapping[int, int] | None = None) -> SweepPlan:
        plans.append(next_sweep(drafts))
        return plans[-1]

    scheduler.next_sweep = recorded  # type: ignore[method-assign]
    return plans


def generate(llm: LLM, prompts: list[list[int]], new_tokens: int, **sampling: Any) -> Run:
    """Greedy completions of token prompts; `sampling` may say what ends them."""
    plans = record_plans(engine_of(llm))
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=new_tokens, **sampling),
        use_tqdm=False,
    )
    assert [output.error for output in outputs] == [None] * len(prompts)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return Run(tokens, [plan for plan in plans if not plan.empty], llm.summary())


def run(directory: Path, prompts: list[list[int]], new_tokens: int, **settings: Any) -> Run:
    """Load a model, complete the prompts, close it."""
    with LLM(directory, **settings) as llm:
        return generate(llm, prompts, new_tokens)


def run_to_the_end(
    directory: Path, prompts: list[list[int]], new_tokens: int, **settings: Any
) -> Run:
    """The same with completions of `new_tokens` each: no end token ends one early.

    Which sweep is the last is then known ahead, so that no weights are fetched for nothing.
    """
    with LLM(directory, **settings) as llm:
        return generate(llm, prompts, new_tokens, ignore_eos=True)


def cached_reference(
    config: pytest.Config, directory: Path, prompts: list[list[int]], new_tokens: int
) -> list[list[int]]:
    """What transformers generates; kept in pytest's cache, for it takes minutes on a small machine.

    The key holds all that the tokens depend on: the model's files, the prompts, the versions.
    """
    files = sorted(directory.iterdir())
    facts = [
        [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        [transformers.__version__, new_tokens, prompts],
    ]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    path = config.cache.mkdir("flexrun_reference") / f"{name}.json"  # type: ignore[union-attr]
    if not path.exists():
        ends = sorted(end_token_ids(directory, Tokenizer.load(directory)))
        path.write_text(json.dumps(greedy_tokens(directory, prompts, new_tokens, ends)))
    return json.loads(path.read_text())
