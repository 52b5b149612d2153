"""Facts about rehearsals: the best plans of a job on a virtual clock, before one is taken."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from flexrun import rehearsal
from flexrun.rehearsal import quickest, rehearsed_seconds
from offload.tiers import Split, Tier
from policy_search.named_models import NAMED_MODELS
from policy_search.policy import Policy
from policy_search.presets import PRESETS
from policy_search.search import Candidate, Search
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


def placed(search: Search, **batch: Any) -> Candidate:
    """A third of the weights on the device, and all pages."""
    weights = Split(device=30, host=70)
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
    much = few._replace(prediction=replace(few.prediction, tokens_per_second=2.0 * rate))
    assert quickest(search, [many, much]) is much  # that far off the closed form never is


def test_a_search_ends_with_what_is_quickest():
    """Not with the best by the closed form, which is another one."""
    search = search_for(JobLengths(100, 60, 30, 120, prompts=(700, *[43] * 99)))
    candidates = search.run()
    found = quickest(search, candidates)
    first = max(candidates, key=lambda each: each.prediction.tokens_per_second)
    assert rehearsed_seconds(search, found, 4) < rehearsed_seconds(search, first, 4)


def test_large_jobs_are_not_rehearsed(monkeypatch):
    """They would take longer than what is to be gained, and are steady."""
    monkeypatch.setattr(rehearsal, "rehearsed_seconds", lambda *_: pytest.fail("rehearsed"))
    job = JobLengths(100_000, 512, 128)
    search = search_for(job)
    few = placed(search, max_sequences=8, micro_batch_rows=64, max_rows=128)
    many = placed(search, max_sequences=40, micro_batch_rows=64, max_rows=128)
    best = max(few, many, key=lambda each: each.prediction.tokens_per_second)
    assert quickest(search, [few, many]) is quickest(search, [many, few]) is best
    assert quickest(search_for(SHORT), [few]) is few
