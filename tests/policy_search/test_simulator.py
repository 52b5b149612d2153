"""Facts about jobs on a virtual clock, and about `policy-search simulate`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flexrun.schedulers import SCHEDULERS
from offload.pages import PagePools
from offload.tiers import Tier
from policy_search.__main__ import main
from policy_search.simulator import simulate
from policy_search.sweep_load import SweepLoad, SweepTerms
from policy_search.workload import Lengths


def run(capsys, *arguments: str) -> dict[str, Any]:
    assert main(["simulate", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def one_second(load: SweepLoad) -> SweepTerms:
    return SweepTerms(1.0, {})


def scheduler_of(kind: str, pages: int = 1000, **settings):
    settings = {"max_rows": 64, "max_sequences": 4, "micro_batch_rows": 64} | settings
    return SCHEDULERS[kind](PagePools({Tier.DEVICE: pages}, 4), **settings)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_row_that_is_needed_is_computed_once(kind):
    """A request of p prompt tokens and n outputs takes p + n - 1 rows; the last token has none."""
    lengths = [Lengths(3 + n % 7, 1 + n % 5) for n in range(40)]
    result = simulate(scheduler_of(kind), lengths, one_second, max_tokens=9)
    assert result.rows == sum(p + n - 1 for p, n in lengths)
    assert result.generated_tokens == sum(n for _, n in lengths)
    assert result.makespan_seconds == result.sweeps


def test_a_small_job_by_hand():
    """Two places, three requests: the third takes the place of the first one to end."""
    lengths = [Lengths(4, 2), Lengths(4, 4), Lengths(4, 3)]
    seen: list[SweepLoad] = []

    def cost(load: SweepLoad) -> SweepTerms:
        seen.append(load)
        return SweepTerms(0.5, {})

    result = simulate(scheduler_of("continuous", max_sequences=2), lengths, cost, max_tokens=8)
    # Rows, and the keys that they attend to: prompts of four have 1 + 2 + 3 + 4.
    assert [(load.rows, load.positions) for load in seen] == [
        (8, 20),
        (2, 10),
        (5, 16),
        (2, 12),
        (1, 6),
    ]
    # Of these, the rows that generate, and all they attend to; no prompt was in pieces.
    assert [(load.generating, load.read, load.stored) for load in seen] == [
        (0, 0, 0),
        (2, 10, 0),
        (1, 6, 0),
        (2, 12, 0),
        (1, 6, 0),
    ]
    assert (result.sweeps, result.makespan_seconds, result.tokens_per_second) == (5, 2.5, 3.6)
    assert result.slot_utilization == pytest.approx(9 / 10)


def test_a_small_cache_costs_rows_and_no_request():
    """With few pages sequences are computed again; all of them end."""
    lengths = [Lengths(5, 20)] * 8
    result = simulate(scheduler_of("continuous", pages=14), lengths, one_second, max_tokens=20)
    assert result.preemptions > 0
    assert result.rows > sum(p + n - 1 for p, n in lengths)


@pytest.mark.parametrize(("workload", "least"), [("conv", 2.5), ("code", 4.0)])
@pytest.mark.parametrize(
    ("rows", "seeds"),
    [
        pytest.param("default", range(1), id="free-rows"),
        pytest.param("1000000", range(1), id="all-rows"),
        pytest.param("default", range(1, 5), id="free-rows-again", marks=pytest.mark.slow),
        pytest.param("1000000", range(1, 2), id="all-rows-again", marks=pytest.mark.slow),
    ],
)
def test_full_sweeps_are_fewer(capsys, workload, least, rows, seeds):
    """2 048 requests in 64 places take that many times fewer sweeps than in FlexGen's blocks, also
    if the prompts of a whole block are computed in one sweep.
    """
    ratios = []
    for seed in seeds:
        given = ["--workload", workload, "--seed", str(seed)]
        given += [] if rows == "default" else ["--max-rows", rows]
        sweeps = {
            kind: run(capsys, *given, "--scheduler", kind)["sweeps"]
            for kind in ("static", "continuous")
        }
        ratios.append(sweeps["static"] / sweeps["continuous"])
    assert min(ratios) >= least


def test_the_longest_first_drains_well(capsys):
    """Where lengths are known, hardly a place is empty at the end."""
    given = ["--workload", "code", "--requests", "512", "--known-lengths"]
    longest = run(capsys, *given, "--order", "longest")
    as_given = run(capsys, *given, "--order", "input")
    assert longest["makespan_seconds"] < as_given["makespan_seconds"]


def test_a_scheduler_that_stops_early_is_found_out():
    """An empty plan while requests wait is no finished job."""
    scheduler = scheduler_of("continuous")
    scheduler.max_sequences = 0
    with pytest.raises(AssertionError, match="stopped before"):
        simulate(scheduler, [Lengths(4, 2)], one_second)


def test_no_requests_is_an_empty_job(capsys):
    result = run(capsys, "--requests", "0")
    assert (result["sweeps"], result["rows"], result["makespan_seconds"]) == (0, 0, 0)
    assert main(["simulate", "--requests", "0"]) == 0


def test_one_request_takes_a_sweep_a_token(capsys):
    given = ["--workload", "fixed", "--requests", "1", "--prompt-len", "100", "--gen-len", "7"]
    result = run(capsys, *given)
    assert (result["sweeps"], result["rows"], result["slot_utilization"]) == (7, 106, 1 / 64)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--requests", "-1"], "--requests must be at least 0"),
        (["--tflops", "0"], "--tflops must be at least"),
        (["--scale", "0"], "scale must be above 0"),
        (["--max-rows", "0"], "whole number of at least 1"),
        (["--kv-tokens", "64"], "does not fit into the KV cache of 64"),
        (["--workload", "poems"], "invalid choice"),
        (["--kv-bits", "8"], "--kv-bits: invalid choice"),
        (["--model", "nowhere"], "no model is known by this name"),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, arguments, says):
    assert main(["simulate", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_bits_make_a_job_smaller(capsys):
    """Of the KV cache its pages; of weights what is on its way in every sweep."""
    given = ["--requests", "4", "--workload", "fixed", "--gen-len", "4"]
    plain = run(capsys, *given)
    packed = run(capsys, *given, "--kv-bits", "4")
    assert packed["kv_bytes"] * 16 == plain["kv_bytes"] * 4.5
    assert packed == plain | {"kv_bytes": packed["kv_bytes"]}
    light = run(capsys, *given, "--weight-bits", "4")
    assert light["sweep_weight_seconds"] < plain["sweep_weight_seconds"] / 3
    assert main(["simulate", *given, "--kv-bits", "4"]) == 0


def test_a_model_and_a_link_make_the_clock(capsys, tiny_llama_dir):
    """The model's weights over the link's speed is what a sweep takes that has few rows."""
    given = ["--model", str(tiny_llama_dir), "--requests", "3", "--workload", "fixed"]
    given += ["--link", "1MB/s", "--streamed", "3MB", "--tflops", "1000", "--gen-len", "4"]
    result = run(capsys, *given)
    assert result["sweep_weight_seconds"] == pytest.approx(3.0)
    assert result["makespan_seconds"] == pytest.approx(3.0 * result["sweeps"])
