"""Facts about the lengths that jobs are made of."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from policy_search.errors import PolicyError
from policy_search.workload import TABLES, WORKLOADS, JobLengths, Lengths, Workload

PUBLISHED = {
    "conv": ((1155, 1109), (211, 163)),
    "code": ((2048, 1974), (27.9, 59.9)),
    "summarization": ((2588, 945), (291, 531)),
}
"""Mean and standard deviation of prompts and outputs in the traces themselves."""


def draw(workload: str, requests: int, **more: Any) -> list[Lengths]:
    return Workload(workload=workload, requests=requests, **more).lengths()


@pytest.mark.parametrize("workload", TABLES)
def test_lengths_have_the_published_means(workload):
    """Means within 5 %, of the few long outputs of code within 10 %."""
    lengths = np.array(draw(workload, 50_000))
    for column, (mean, deviation) in enumerate(PUBLISHED[workload]):
        tolerance = 0.1 if workload == "code" and column else 0.05
        assert lengths[:, column].mean() == pytest.approx(mean, rel=tolerance)
        if workload != "code":  # whose longest outputs are too rare for a table
            assert lengths[:, column].std() == pytest.approx(deviation, rel=0.15)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_seed_gives_the_same_lengths(workload):
    assert draw(workload, 100, seed=3) == draw(workload, 100, seed=3)
    if workload != "fixed":
        assert draw(workload, 100, seed=3) != draw(workload, 100, seed=4)


@pytest.mark.parametrize(("workload", "scale"), [*itertools.product(TABLES, [1.0, 0.125, 1e-9])])
def test_lengths_are_scaled_and_never_nothing(workload, scale):
    full, scaled = (np.array(draw(workload, 500, scale=s)) for s in (1.0, scale))
    assert (scaled == np.maximum(1, np.rint(full * scale))).mean() > 0.9, "rounded once"
    assert scaled.min() >= 1
    assert scaled[:, 1].max() <= Workload(workload=workload, scale=scale).max_tokens


def test_requests_stay_within_the_limit_of_their_trace():
    assert max(map(sum, draw("summarization", 20_000))) <= 4096


def test_fixed_lengths_are_as_given():
    assert draw("fixed", 3, prompt_len=7, gen_len=5) == [(7, 5)] * 3


@pytest.mark.parametrize(("workload", "scale"), [("chat", 1.0), ("conv", 0.0), ("conv", -1)])
def test_what_makes_no_sense_is_refused(workload, scale):
    with pytest.raises(PolicyError):
        draw(workload, 3, scale=scale)


@pytest.mark.parametrize("longest", [11, 22, 40])
def test_drawn_jobs_are_as_told(longest):
    """The mean and the longest of many outputs within 5 %, in orders that differ; prompts stay."""
    job = JobLengths(1000, 50, 11, longest, prompts=(3, 1, 2))
    drawn = job.drawn(0, 2048)
    assert [each.prompt for each in drawn[:4]] == [3, 1, 2, 3]
    outputs = [each.output for each in drawn]
    assert sum(outputs) / 1000 == pytest.approx(11, rel=0.05)
    assert 0.95 * longest <= max(outputs) <= longest
    again = [each.output for each in job.drawn(1, 2048)]
    assert sorted(again) == sorted(outputs)
    assert (again != outputs) == (longest > 11)


def test_drawn_prompts_are_the_mean_where_none_is_known():
    assert JobLengths(3, 7.4, 5).drawn(0, 2048) == [(7, 5)] * 3


def test_the_longest_sequence_of_a_job():
    """What is said of it, or the longest prompt with the longest output."""
    assert JobLengths(3, 7.4, 5).longest_sequence == 13
    assert JobLengths(3, 7.4, 5, 6.5, prompts=(2, 30)).longest_sequence == 37
    assert JobLengths(3, 7.4, 5, 6.5, prompts=(2, 30), most_tokens=34).longest_sequence == 34
    assert JobLengths.of([Lengths(9, 2), Lengths(3, 5)]).longest_sequence == 11


def test_a_workload_has_room_for_what_requests_may_generate():
    """A scheduler knows only the most of all: the longest prompt may have it, too."""
    for known in (False, True):
        table = Workload(workload="conv", scale=0.05, requests=40, known_lengths=known)
        lengths, most = table.lengths(), 50
        job = table.job()
        assert job.longest == max(each.output for each in lengths) < most
        outputs = [each.output if known else most for each in lengths]
        longest = max(each.prompt + output for each, output in zip(lengths, outputs))
        assert job.longest_sequence == longest


def test_drawn_outputs_end_with_the_context():
    job = JobLengths(4, 10, 6, 6, prompts=(10, 15, 16))
    assert job.drawn(0, 17) == [(10, 6), (15, 2), (16, 1), (10, 6)]
