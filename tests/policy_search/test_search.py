"""Facts about the search for a plan: it fits, it is not worse than others, and it says why not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from offload.errors import CapacityError
from offload.tiers import Split, Tier
from policy_search.advice import advise
from policy_search.automatic import automatic_policy
from policy_search.errors import PolicyError
from policy_search.goal import Goal
from policy_search.job_pricing import Candidate
from policy_search.least_memory import with_least_memory
from policy_search.memory import longest_held
from policy_search.named_models import NAMED_MODELS
from policy_search.plan_text import plan_text
from policy_search.planner import Planner
from policy_search.policy import DEFAULT_DEPTH, Policy
from policy_search.presets import PRESETS
from policy_search.rivals import rivals
from policy_search.search import Search
from policy_search.shape_from_config import shape_from_config
from policy_search.workload import JobLengths

GIB = 2**30


def search(model: str = "llama-3-70b", preset: str = "4090", **changed: Any) -> Search:
    spec = PRESETS[preset]
    config = NAMED_MODELS[model]
    stored, computed = config.types("auto", unified=spec.unified)
    known: dict[str, Any] = {
        "shape": shape_from_config(config, stored, computed),
        "limits": {**spec.limits, Tier.HOST: 128 * GIB},
        "base": Policy(),
        "context": 2048,
        "unified": spec.unified,
        "job": JobLengths(1024, 512, 128),
        "hardware": spec.hardware,
    }
    return Search(**known | changed)


def random_search(seed: int) -> Search:
    """Any model on any machine with a part of its memory, for any job, in any bits."""
    draw = random.Random(seed)
    spec = PRESETS[draw.choice(sorted(PRESETS))]
    config = NAMED_MODELS[draw.choice(sorted(NAMED_MODELS))]
    bits = 16 if config.prequantized else draw.choice([16, 8, 4])
    base = Policy(weight_bits=bits, kv_bits=draw.choice([16, 4]))
    stored, computed = config.types("auto", unified=spec.unified)
    context = draw.choice([1024, 2048, config.context_length])
    job = JobLengths(draw.randint(1, 20000), draw.randint(1, 1500), draw.randint(1, 400))
    return Search(
        shape=shape_from_config(config, stored, computed, base.quantization),
        limits={tier: int(limit * draw.uniform(0.05, 1)) for tier, limit in spec.limits.items()},
        base=base,
        context=context,
        unified=spec.unified,
        job=job.within(context),
        hardware=spec.hardware,
    )


SLOW = [pytest.param(part, marks=pytest.mark.slow) for part in range(1, 10)]


@pytest.mark.parametrize("part", [0, *SLOW])
def test_no_plan_takes_more_than_there_is(part):
    """Of a hundred draws; where nothing fits, the error names what is missing and a flag."""
    planned = 0
    for seed in range(part, 100, 10):
        drawn = random_search(seed)
        shortage = None
        try:
            candidates = drawn.run()
        except CapacityError as error:
            shortage = error
        if shortage is not None:
            assert "missing" in shortage.message or "no room" in shortage.message
            assert "--" in (shortage.hint or "")
            continue
        planned += 1
        for each in candidates:
            assert all(used.free >= 0 for used in each.memory.values())
            assert sum(used.weights for used in each.memory.values()) == drawn.shape.weight_bytes
            assert any(used.kv for used in each.memory.values())
            assert each.prediction.tokens_per_second > 0
    assert planned > 2


def held_by(here: Search, candidates: Iterable[Candidate]) -> list[int]:
    return [longest_held(here.shape, each.policy, each.memory) for each in candidates]


@pytest.mark.parametrize("disk", [0, 2000 * GIB])
@pytest.mark.parametrize("longest", [4000, 100_000])
def test_every_plan_has_room_for_the_longest_sequence(longest, disk):
    """One request among a thousand, whose pages pass through staging; plans for the others alone
    fill the device with weights, so that some have none for it.
    """
    limits = {Tier.DEVICE: 12 * GIB, Tier.HOST: 192 * GIB, Tier.DISK: disk}
    job = JobLengths(1024, 512, 128, most_tokens=longest)
    here = search(limits=limits, context=131_072, job=job)
    found = here.run()
    assert min(held_by(here, found)) >= longest
    others = replace(here, job=replace(job, most_tokens=0)).run()
    assert 640 <= min(held_by(here, others)) < longest
    rates = [Goal().best(each).prediction.tokens_per_second for each in (found, others)]
    assert rates[0] >= 0.95 * rates[1]  # staging is a small part of the memory


@pytest.mark.parametrize("sequences", [8, 512])
def test_weights_make_room_for_the_pages_of_the_longest_sequence(sequences):
    """Its pages take two thirds of the RAM, which weights would fill; a few sequences that run
    beside each other have less in all. As fast as any random plan with that room.
    """
    limits = {Tier.DEVICE: 24 * GIB, Tier.HOST: 48 * GIB, Tier.DISK: 2000 * GIB}
    job = JobLengths(sequences, 512, 128, most_tokens=100_000)
    here = search(limits=limits, context=131_072, job=job)
    found = here.run()
    assert min(held_by(here, found)) >= 100_000
    best = max(each.prediction.tokens_per_second for each in found)
    draw, fitting = random.Random(0), 0
    for _ in range(600):
        added = here.add(random_policy(draw))
        if not isinstance(added, CapacityError):
            fitting += 1
            assert added.prediction.tokens_per_second <= 1.02 * best, added.policy
    assert fitting > 5


def test_fewer_rows_make_room_for_the_longest_sequence():
    """Before any request is given up."""
    limits = {Tier.DEVICE: 7 * GIB // 2, Tier.HOST: 64 * GIB, Tier.DISK: 0}
    job = JobLengths(512, 512, 128, most_tokens=100_000)
    base = Policy(max_rows=4096, micro_batch_rows=4096)
    here = search("llama-3-8b", limits=limits, context=131_072, job=job, base=base)
    found = here.run()
    assert min(held_by(here, found)) >= 100_000
    assert max(each.policy.micro_batch_rows for each in found) < 4096
    given = replace(here, given=["max_rows", "micro_batch_rows"])
    assert min(held_by(here, given.run())) < 50_000


def test_plans_for_shorter_sequences_are_no_alternatives():
    """Neither with less memory, nor as what a plan is compared with: all have room for the longest
    sequence that the plan has room for.
    """
    limits = {Tier.DEVICE: 6 * GIB, Tier.HOST: 64 * GIB, Tier.DISK: 0}
    job = JobLengths(4, 512, 128, most_tokens=60_000)
    planner = planner_of(limits=limits, context=131_072, job=job)
    plan = with_least_memory(planner, Policy())
    assert plan.room_for == 60_000
    without = with_least_memory(replace(planner, job=replace(job, most_tokens=0)), Policy())
    assert plan.search.limits[Tier.HOST] > 1.1 * without.search.limits[Tier.HOST]
    for each in rivals(plan).values():
        assert each is None or min(held_by(plan.search, [each])) >= 60_000
    assert any(rivals(plan).values())


def test_bits_that_have_room_for_the_longest_sequence_are_chosen():
    """Where plain pages have not."""
    limits = {Tier.DEVICE: 6 * GIB, Tier.HOST: 20 * GIB, Tier.DISK: 0}
    job = JobLengths(64, 512, 128, most_tokens=100_000)
    planner = planner_of(limits=limits, context=131_072, job=job)
    choice, plan = planner.choose(Policy(), 16, None)
    assert choice.chosen.name == "16/4"
    assert plan.room_for == 100_000
    assert planner.plan(Policy()).room_for < 100_000


def test_a_job_that_is_too_long_for_any_plan_is_planned_all_the_same():
    """For the longest sequences there is room for; the plan says which ones fail."""
    limits = {Tier.DEVICE: 16 * GIB, Tier.HOST: 0, Tier.DISK: 0}
    job = JobLengths(64, 512, 128, most_tokens=8192)
    planner = planner_of(limits=limits, context=8192, job=job, config=NAMED_MODELS["opt-6.7b"])
    plan = planner.plan(Policy())
    held = plan.room_for
    assert 8192 / 2 <= held < 8192
    text = plan_text(plan)
    assert f"sequences of {held:,} tokens: longer ones, of up to 8,192, will fail" in text
    fewer = replace(planner, job=replace(job, most_tokens=0)).plan(Policy())
    assert "will fail" not in plan_text(fewer)


def test_no_other_plan_is_faster():
    """Not the one that needs no speeds, nor those of many draws that fit."""
    here = search()
    best = Goal().best(here.run()).prediction.tokens_per_second
    known = here.shape, here.limits, here.base, here.context
    automatic = here.price(automatic_policy(*known, unified=False))
    assert not isinstance(automatic, CapacityError)
    assert best >= automatic.prediction.tokens_per_second
    draw, fitting = random.Random(0), 0
    for _ in range(300):
        policy = random_policy(draw)
        priced = here.price(policy)
        if not isinstance(priced, CapacityError):
            fitting += 1
            assert priced.prediction.tokens_per_second <= 1.02 * best, policy
    assert fitting > 15


@pytest.mark.parametrize(("model", "gib"), [("llama-3-8b", 10), ("qwen3-30b-a3b", 16)])
@pytest.mark.parametrize("job", [JobLengths(60, 300, 40), JobLengths(1024, 512, 128)])
def test_no_batch_of_a_grid_is_faster(model, gib, job):
    """All sizes of a batch at once, with every share of weights on the device and pages there, and
    with pages in RAM, on a machine without a disk: the search tries a few, and is as fast.
    """
    limits = {Tier.DEVICE: gib * GIB, Tier.HOST: 128 * GIB, Tier.DISK: 0}
    here = search(model, "4090", job=job, limits=limits)
    found = here.run()
    for kv_cache in (Split(device=100), Split(host=100)):
        best = max(
            each.prediction.tokens_per_second
            for each in found
            if each.policy.pages_on_device or kv_cache.host
        )
        fitting = 0
        for rows, most, count in itertools.product((64, 256, 1024), (512, 2048), (16, 60, 200)):
            for device in range(0, 80, 5):
                policy = Policy(
                    weights=Split(device=device, host=100 - device),
                    kv_cache=kv_cache,
                    max_sequences=count,
                    micro_batch_rows=rows,
                    max_rows=max(most, rows),
                    prefetch_depth=DEFAULT_DEPTH,
                )
                priced = here.price(policy)
                if not isinstance(priced, CapacityError):
                    fitting += 1
                    assert priced.prediction.tokens_per_second <= 1.02 * best, policy
        assert fitting > 50


def test_fewer_rows_are_tried_where_the_usual_ones_do_not_fit():
    """Unless they are given: then the shortage is said, with the flag."""
    limits = {Tier.DEVICE: 2 * GIB, Tier.HOST: 64 * GIB, Tier.DISK: 0}
    base = Policy(micro_batch_rows=8192, max_rows=16384)
    found = search("llama-3-8b", limits=limits, base=base).run()
    assert all(each.policy.micro_batch_rows < 8192 for each in found)
    with pytest.raises(CapacityError) as caught:
        search("llama-3-8b", limits=limits, base=base, given=["micro_batch_rows"]).run()
    assert "--micro-batch" in (caught.value.hint or "")
    few = replace(base, max_rows=100)
    found = search("llama-3-8b", limits=limits, base=few, given=["max_rows"]).run()
    assert {each.policy.max_rows for each in found} == {100}
    with pytest.raises(CapacityError):
        search("llama-3-8b", limits={**limits, Tier.DEVICE: GIB // 4}).run()


def test_ram_that_is_smaller_than_the_weights():
    """Nor does the device hold all; together they do, without a disk: less on the device does not
    fit, either.
    """
    limits = {Tier.DEVICE: 12 * GIB, Tier.HOST: 9 * GIB, Tier.DISK: 0}
    here = search("llama-3-8b", limits=limits, job=JobLengths(60, 300, 40))
    best = Goal().best(here.run())
    grid = (
        here.price(replace(best.policy, weights=Split(device=share, host=100 - share)))
        for share in range(100)
    )
    rates = [p.prediction.tokens_per_second for p in grid if not isinstance(p, CapacityError)]
    assert 5 < len(rates) < 50
    assert max(rates) <= 1.02 * best.prediction.tokens_per_second


def random_policy(draw: random.Random) -> Policy:
    def split(most: int) -> Split:
        device = draw.randint(0, most)
        host = draw.randint(0, 100 - device)
        return Split(device=device, host=host, disk=100 - device - host)

    rows = draw.choice([128, 256, 512, 1024])
    return Policy(
        weights=split(12),
        kv_cache=draw.choice([split(20), Split(host=100), Split(device=100)]),
        max_sequences=draw.randint(8, 600),
        micro_batch_rows=rows,
        max_rows=max(2048, rows),
    )


def test_what_is_given_stays():
    """A split, a batch, both, or all of it."""
    weights = Split(device=5, host=65, disk=30)
    base = Policy(weights=weights, max_sequences=7, micro_batch_rows=64)
    for given in (["weights"], ["max_sequences", "micro_batch_rows"], ["weights", "max_sequences"]):
        for each in search(base=base, given=given).run():
            assert all(getattr(each.policy, name) == getattr(base, name) for name in given)
    for pages in (Split(host=100), Split(device=1, host=99)):
        kept = replace(base, kv_cache=pages)
        for given in (["weights", "kv_cache"], ["kv_cache"]):
            found = search(base=kept, given=given, context=131_072).run()
            assert {each.policy.kv_cache for each in found} == {pages}


def test_a_model_that_fits_is_not_offloaded():
    """8 GB of weights beside 80: nothing is anywhere else."""
    job = JobLengths(256, 512, 128)
    best = Goal().best(search("llama-3-8b", "h100", job=job).run())
    assert best.policy.weights == best.policy.kv_cache == Split(device=100)


def test_goals_are_met_or_refused():
    """A shorter latency costs throughput; what cannot be met is said with the nearest there is."""
    candidates = search().run()
    free = Goal().best(candidates).prediction
    least = min(each.prediction.request_seconds for each in candidates)
    assert least < free.request_seconds
    quick = Goal(max_latency=1.1 * least).best(candidates).prediction
    assert quick.request_seconds <= 1.1 * least
    assert quick.tokens_per_second < free.tokens_per_second
    with pytest.raises(PolicyError, match="no plan finishes a request within 1 s") as caught:
        Goal(max_latency=1).best(candidates)
    assert "raise --max-latency to" in str(caught.value)
    with pytest.raises(PolicyError, match="no plan finishes the job within 1 s"):
        Goal(deadline=1).best(candidates)
    with pytest.raises(PolicyError, match="no plan meets both"):
        Goal(max_latency=least, deadline=free.job_seconds).best(candidates)
    with pytest.raises(PolicyError, match="--deadline must be above 0"):
        Goal(deadline=0)


def test_advice_is_what_helps():
    """A job bound by its disk: more RAM and a faster disk, and not what it does not wait for."""
    here = search(limits={Tier.DEVICE: 20 * GIB, Tier.HOST: 64 * GIB, Tier.DISK: 2000 * GIB})
    best = Goal().best(here.run())
    assert best.prediction.bound == "disk->host"
    found = {each.change: each.factor for each in advise(here, Goal(), best)}
    assert found["a disk twice as fast"] > 1.2
    assert found["+32 GiB of RAM"] > 1.1
    assert "a device twice as fast" not in found
    assert list(found.values()) == sorted(found.values(), reverse=True)


def planner_of(**changed: Any) -> Planner:
    spec = PRESETS["4090"]
    known: dict[str, Any] = {
        "config": NAMED_MODELS["llama-3-8b"],
        "dtype": "auto",
        "limits": {**spec.limits, Tier.DEVICE: 10 * GIB},
        "unified": False,
        "context": 2048,
        "batch": {},
        "job": JobLengths(1024, 512, 128),
        "hardware": spec.hardware,
    }
    return Planner(**known | changed)


def test_the_least_memory_is_enough():
    """95 % of the throughput, or the deadline, with less RAM; with a tenth less it is not."""
    batch = {"max_sequences": 128, "micro_batch_rows": 512, "max_rows": 2048}
    planner = partial(planner_of, batch=batch)  # the only one that is tried
    best = planner().plan(Policy())
    found = with_least_memory(planner(), Policy())
    ram = found.search.limits[Tier.HOST]
    assert ram < best.search.limits[Tier.HOST]
    assert found.prediction.tokens_per_second >= 0.95 * best.prediction.tokens_per_second
    limits = {**found.search.limits, Tier.HOST: int(0.9 * ram)}
    less = planner(limits=limits).plan(Policy()).prediction
    assert less.tokens_per_second < 0.95 * best.prediction.tokens_per_second
    relaxed = Goal(deadline=2 * best.prediction.job_seconds)
    slower = with_least_memory(planner(goal=relaxed), Policy())
    assert slower.prediction.job_seconds <= 2 * best.prediction.job_seconds
    assert slower.search.limits[Tier.HOST] < ram


def test_rivals_are_slower():
    """By the same model none of the simpler plans is faster; what does not fit is said."""
    plan = planner_of().plan(Policy())
    others = rivals(plan)
    assert others["nothing offloaded"] is None
    assert others["FlexGen's way"] is not None
    rates = [each.prediction.tokens_per_second for each in others.values() if each is not None]
    assert max(rates) <= plan.prediction.tokens_per_second


def test_the_simpler_plan_is_taken_unless_another_is_much_faster():
    """Nothing offloaded before weights alone, and these before pages; by 15 %."""
    candidates = search("llama-3-8b", "h100", job=JobLengths(4, 512, 128)).run()
    plain = candidates[0]

    def at(rate, weights, kv_cache):
        policy = replace(
            plain.policy, weights=weights, kv_cache=kv_cache, activations=Split(device=100)
        )
        prediction = replace(plain.prediction, tokens_per_second=rate)
        return plain._replace(policy=policy, prediction=prediction)

    here, half, there = Split(device=100), Split(device=50, host=50), Split(host=100)
    nothing, weights, pages = at(86.0, here, here), at(90.0, half, here), at(100.0, half, there)
    assert Goal().best([pages, weights, nothing]) is nothing
    assert Goal().best([pages, weights]) is weights
    assert Goal().best([pages]) is pages
    slow = at(84.0, here, here), at(84.5, half, here)
    assert Goal().best([pages, *slow]) is pages
    assert Goal().best([pages, weights, slow[0]]) is weights
