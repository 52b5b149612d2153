"""Facts about rehearsals: the best plans of a job on a virtual clock, before one is taken."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from flexrun import rehearsal
from flexrun.rehearsal import quickest, rehearsed_seconds
from offload.tiers import Split, Tier
from policy_search.job_pricing import Candidate
from policy_search.named_models import NAMED_MODELS
from policy_search.policy import Policy
from policy_search.presets import PRESETS
from policy_search.search import Search
from policy_search.shape_from_config import shape_from_config
from policy_search.sweep_cost import SweepCost
from policy_search.workload import JobLengths

GIB = 2**30
SHORT = JobLengths(40, 59.35, 11.0, 40.0, prompts=(700, *[43] * 39))
"""A few blocks of ragged sequences."""


def search_for(job: JobLengths, **changed: Any) -> Search:
    """For a model of which half fits on the device."""
    spec = PRESETS["4090"]
    config = NAMED_MODELS["opt-30b"]
    known: dict[str, Any] = {
        "shape": shape_from_config(config, *config.types("auto", unified=False)),
        "limits": {**spec.limits, Tier.HOST: 128 * GIB},
        "base": Policy(),
        "context": 2048,
        "unified": False,
        "job": job,
        "hardware": spec.hardware,
    }
    return Search(**known | changed)


def placed(search: Search, device: float = 30, **batch: Any) -> Candidate:
    """Some percent of the weights on the device, and all pages."""
    weights = Split(device=device, host=100 - device)
    policy = replace(Policy(), weights=weights, kv_cache=Split(device=100), **batch)
    found = search.price(policy)
    assert isinstance(found, Candidate)
    return found


def test_a_job_bound_by_its_weights_takes_them_once_for_each_token():
    """Sequences that begin together, in one sweep of all prompts: no formula of jobs needed."""
    search = search_for(JobLengths(4, 8, 20))
    found = placed(search, max_sequences=4, micro_batch_rows=64, max_rows=64)
    cost = SweepCost(search.shape, found.policy, found.memory, search.hardware, unified=False)
    arriving = cost.streamed / search.hardware.host_to_device
    assert 20 * arriving <= rehearsed_seconds(search, found) <= 20.4 * arriving


def test_another_order_of_outputs_takes_another_time():
    """And all rounds count as much."""
    search = search_for(SHORT)
    found = placed(search, max_sequences=8, micro_batch_rows=64, max_rows=128)
    one, two = rehearsed_seconds(search, found, 1), rehearsed_seconds(search, found, 2)
    second = 2 * two - one
    assert one != second
    assert second == pytest.approx(one, rel=0.3)


def test_what_has_no_room_for_the_longest_takes_forever():
    """Such a request would fail in the job, too."""
    search = search_for(replace(SHORT, prompts=(10**6, *SHORT.prompts[1:])))
    found = placed(search, max_sequences=8, micro_batch_rows=64, max_rows=128)
    assert rehearsed_seconds(search, found) == math.inf


def test_the_quickest_is_taken_and_not_the_first():
    """By the closed form as many sequences are as fast in another plan, which it is wrong about."""
    search = search_for(SHORT)
    few = placed(search, max_sequences=8, micro_batch_rows=64, max_rows=128)
    many = placed(search, max_sequences=40, micro_batch_rows=64, max_rows=128)
    assert rehearsed_seconds(search, many, 4) < rehearsed_seconds(search, few, 4)
    rate = many.prediction.tokens_per_second
    believed = few._replace(prediction=replace(few.prediction, tokens_per_second=1.1 * rate))
    assert quickest(search, [many, believed]) is many


def test_a_search_ends_with_what_is_quickest():
    """Not with the best by the closed form, which is another one."""
    search = search_for(JobLengths(100, 60, 30, 120, prompts=(700, *[43] * 99)))
    candidates = search.run()
    found = quickest(search, candidates)
    first = max(candidates, key=lambda each: each.prediction.tokens_per_second)
    assert found is not None
    assert rehearsed_seconds(search, found, 4) < rehearsed_seconds(search, first, 4)


@pytest.mark.parametrize(
    ("job", "sequences"),
    [(JobLengths(100_000, 512, 128), 40), (JobLengths(4096, 1900, 1), 40),
     (JobLengths(400, 60, 100), 1)],
)  # fmt: skip
def test_large_jobs_are_not_rehearsed(monkeypatch, job, sequences):
    """They would take longer than what is to be gained: for their outputs, for their prompts, or
    because few run at once.
    """
    monkeypatch.setattr(rehearsal, "rehearsed_seconds", lambda *_: pytest.fail("rehearsed"))
    search = search_for(job)
    one = placed(search, max_sequences=sequences, micro_batch_rows=64, max_rows=128)
    other = placed(search, max_sequences=sequences, micro_batch_rows=128, max_rows=128)
    assert quickest(search, [one, other]) is None


def test_one_plan_needs_no_rehearsal(monkeypatch):
    """Or some of which only one is near the best."""
    monkeypatch.setattr(rehearsal, "rehearsed_seconds", lambda *_: pytest.fail("rehearsed"))
    search = search_for(SHORT)
    few = placed(search, max_sequences=2, micro_batch_rows=64, max_rows=128)
    many = placed(search, max_sequences=40, micro_batch_rows=64, max_rows=128)
    assert quickest(search, [few]) is None
    assert quickest(search, [few, many]) is None


def test_outputs_of_one_length_have_one_order(monkeypatch):
    """One round is enough."""
    rounds: list[int] = []

    def rehearsed(*given: Any) -> float:
        rounds.append(given[2])
        return 1.0

    monkeypatch.setattr(rehearsal, "rehearsed_seconds", rehearsed)
    for job in (JobLengths(40, 50, 40, 40), SHORT):
        search = search_for(job)
        sizes = [{"max_sequences": 40, "micro_batch_rows": n, "max_rows": 128} for n in (64, 128)]
        quickest(search, [placed(search, **size) for size in sizes])
    assert rounds == [1, 1, 4, 4]


def test_a_plan_without_room_for_a_request_is_never_the_quickest():
    """Its pages are many, but those of one sequence have to fit into staging."""
    search = search_for(SHORT)
    weights = Split(device=30, host=70)
    batch: dict[str, Any] = {"max_sequences": 40, "micro_batch_rows": 64, "max_rows": 128}
    priced = search.price(Policy(weights=weights, kv_cache=Split(host=100), **batch))
    assert isinstance(priced, Candidate)
    assert math.isfinite(rehearsed_seconds(search, priced))
    page_bytes = priced.policy.page_tokens * search.shape.kv_token_bytes
    host = priced.memory[Tier.HOST]
    assert host.kv > 1000 * page_bytes
    few = replace(host, kv_of_one=700 // priced.policy.page_tokens * page_bytes)
    small = priced._replace(memory=priced.memory | {Tier.HOST: few})
    assert math.isinf(rehearsed_seconds(search, small))


def test_a_request_ends_with_the_context():
    """A long prompt with a long output is no reason to refuse a plan that holds a context."""
    search = search_for(replace(SHORT, longest=1500.0, prompts=(2000, *SHORT.prompts[1:])))
    found = placed(search, device=20, max_sequences=1, micro_batch_rows=64, max_rows=128)
    assert math.isfinite(rehearsed_seconds(search, found))
