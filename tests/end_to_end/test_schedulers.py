"""Every way to fill sweeps gives the same tokens, and computes the rows that are needed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from flexrun.bench import make_requests
from flexrun.cli import main
from flexrun.schedulers import SCHEDULERS
from policy_search.workload import Workload
from tests.end_to_end.harness import run
from tests.end_to_end.reference import greedy_tokens, ragged_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [list(text.encode()) for text in ragged_prompts(12, longest=7)]
NEW_TOKENS = 7
BUDGETS = (64, 256, 100_000)


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> list[list[int]]:
    return greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])


@pytest.mark.parametrize(("kind", "rows"), [*itertools.product(SCHEDULERS, BUDGETS)])
def test_tokens_are_those_of_transformers(tiny_llama_dir, reference, kind, rows):
    """Whatever the schedule and the row budget, with several micro-batches in a sweep."""
    result = run(
        tiny_llama_dir,
        PROMPTS,
        NEW_TOKENS,
        device="cpu",
        dtype="float32",
        weights="device=50,disk=50",
        kv_cache="device=100",
        scheduler=kind,
        max_rows=rows,
        max_sequences=5,
        micro_batch_rows=48,
        num_micro_batches=3,
    )
    assert result.tokens == reference
    assert max(result.micro_batches) >= 3


def run_bench(capsys, directory: Path, kind: str, *more: str) -> dict[str, Any]:
    words = ["bench", "--model", str(directory), "--device", "cpu", "--scale", "0.01"]
    words += ["--dtype", "float32", "--requests", "40", "--scheduler", kind, *more]
    assert main([*words, "--max-sequences", "6", "--num-micro-batches", "2"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_rows_computed_are_rows_needed(tiny_llama_dir, capsys, kind):
    """No padded row, and none of a sequence that has ended; all tokens that were asked for."""
    report = run_bench(capsys, tiny_llama_dir, kind)
    lengths = [
        (len(request.prompt_token_ids), request.ends_after or 0)
        for request in make_requests(Workload(requests=40, scale=0.01), 256)
    ]
    assert report["requests"] == 40
    assert report["rows"] == report["rows_needed"] == sum(p + n - 1 for p, n in lengths)
    assert report["generated_tokens"] == sum(n for _, n in lengths)


def test_full_sweeps_are_fewer(tiny_llama_dir, capsys):
    """Refilled places save sweeps, and prompts that ride along save more."""
    sweeps = {kind: run_bench(capsys, tiny_llama_dir, kind)["sweeps"] for kind in SCHEDULERS}
    assert sweeps["continuous"] < sweeps["phased"] < sweeps["static"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--requests", "-1"], "--requests must be at least 0"),
        (["--scale", "0"], "the scale must be above 0"),
        (["--scale", "1"], "the model's context"),
        (["--scheduler", "lazy"], "invalid choice"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_llama_dir, capsys, more, says):
    words = ["bench", "--model", str(tiny_llama_dir), "--device", "cpu", *more]
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_an_empty_job_is_done(tiny_llama_dir, capsys):
    words = ["bench", "--model", str(tiny_llama_dir), "--device", "cpu", "--requests", "0"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["requests"], report["sweeps"], report["rows"]) == (0, 0, 0)
