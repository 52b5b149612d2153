"""Facts about which rows ride in a sweep."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from flexrun.calibration import RowBudget
from flexrun.plan import MicroBatch, RowSpan, SweepPlan
from flexrun.scheduler import BatchScheduler
from flexrun.schedulers import (
    SCHEDULERS,
    ContinuousScheduler,
    PhasedScheduler,
    StaticScheduler,
)
from offload.pages import PagePools
from offload.tiers import Tier
from policy_search.policy import CHOICES

MANY = 10_000


def make_scheduler(
    *,
    pages: dict[Tier, int] | None = None,
    staging: int | None = None,
    page_tokens: int = 4,
    max_rows: int = 64,
    max_sequences: int = 8,
    micro_batch_rows: int = 64,
    num_micro_batches: int | None = None,
    order: str = "input",
    kind: type[BatchScheduler] = ContinuousScheduler,
) -> Any:
    limits = {} if staging is None else {Tier.HOST: staging}
    return kind(
        PagePools(pages or {Tier.DEVICE: MANY}, page_tokens, limits),
        max_rows=max_rows,
        max_sequences=max_sequences,
        micro_batch_rows=micro_batch_rows,
        num_micro_batches=num_micro_batches,
        order=order,
    )


def commit(scheduler: BatchScheduler, plan: SweepPlan, ending: tuple[int, ...] = ()) -> None:
    """What the engine does after a sweep; the sequences in `ending` got their last token."""
    scheduler.commit(plan)
    for span in plan.spans:
        if span.wants_logits and span.sequence in ending:
            scheduler.finish(span.sequence)


def test_nothing_to_do_is_an_empty_plan():
    """Without sequences the plan has no micro-batches, and no sweep follows."""
    assert make_scheduler().next_sweep() == SweepPlan((), last=True)


def test_a_prompt_is_computed_then_one_row_per_token():
    """A prompt's rows ride together and want logits at their end; then single rows follow."""
    scheduler = make_scheduler()
    scheduler.add(7, 5, 20)
    plan = scheduler.next_sweep()
    assert plan == SweepPlan((MicroBatch((RowSpan(7, 0, 5, True),)),))
    assert (plan.rows, plan.empty) == (5, False)
    commit(scheduler, plan)
    assert scheduler.next_sweep().spans == [RowSpan(7, 5, 1, True)]


def test_a_long_prompt_is_cut_into_chunks():
    """A prompt longer than a micro-batch is computed over several sweeps; the last wants logits."""
    scheduler = make_scheduler(micro_batch_rows=4, max_rows=64)
    scheduler.add(0, 10, 12)
    seen = []
    for _ in range(3):
        plan = scheduler.next_sweep()
        seen += plan.spans
        commit(scheduler, plan)
    assert seen == [RowSpan(0, 0, 4, False), RowSpan(0, 4, 4, False), RowSpan(0, 8, 2, True)]


def test_a_prompt_takes_what_is_left_of_the_budget():
    """The first rows of a prompt fill a sweep up to `max_rows`."""
    scheduler = make_scheduler(max_rows=10)
    for number, prompt in enumerate((6, 7)):
        scheduler.add(number, prompt, 20)
    assert scheduler.next_sweep().spans == [RowSpan(0, 0, 6, True), RowSpan(1, 0, 4, False)]


def test_decodes_go_before_prompts():
    """A sequence that generates is not held up by another one's long prompt."""
    scheduler = make_scheduler(max_rows=8, micro_batch_rows=4)
    scheduler.add(0, 100, 110)
    scheduler.add(1, 2, 10)
    commit(scheduler, scheduler.next_sweep())
    scheduler.max_rows = 4
    assert scheduler.next_sweep().spans == [RowSpan(1, 2, 1, True), RowSpan(0, 4, 3, False)]


def test_decodes_take_turns():
    """If three of seven sequences fit into a sweep, each has a row in any three sweeps."""
    scheduler = make_scheduler(max_rows=7, max_sequences=7)
    for number in range(7):
        scheduler.add(number, 1, 100)
    commit(scheduler, scheduler.next_sweep())
    scheduler.max_rows = 3
    rides = []
    for _ in range(20):
        plan = scheduler.next_sweep()
        commit(scheduler, plan)
        rides.append({span.sequence for span in plan.spans})
    for three in zip(rides, rides[1:], rides[2:]):
        assert set.union(*three) == set(range(7))


def test_waiting_sequences_join_when_others_leave():
    """At most `max_sequences` run; a place that becomes free is taken in the next sweep."""
    scheduler = make_scheduler(max_sequences=2)
    for number in range(4):
        scheduler.add(number, 3, 9)
    plan = scheduler.next_sweep()
    assert [span.sequence for span in plan.spans] == [0, 1]
    commit(scheduler, plan, ending=(0,))
    plan = scheduler.next_sweep()
    assert plan.spans == [RowSpan(1, 3, 1, True), RowSpan(2, 0, 3, True)]


def test_short_sequences_do_not_overtake():
    """A sequence that has to wait for pages holds up those behind it, so its turn comes."""
    scheduler = make_scheduler(pages={Tier.DEVICE: 4})
    for number, prompt in enumerate((6, 12, 2)):
        scheduler.add(number, prompt, 14)
    plan = scheduler.next_sweep()
    assert [span.sequence for span in plan.spans] == [0]
    commit(scheduler, plan, ending=(0,))
    assert [span.sequence for span in scheduler.next_sweep().spans] == [1]


def test_pages_are_taken_as_they_are_needed():
    """What a sequence may grow to costs nothing before it does."""
    scheduler = make_scheduler(pages={Tier.DEVICE: 6}, max_sequences=8)
    for number in range(3):
        scheduler.add(number, 4, 24)
    plan = scheduler.next_sweep()
    assert [span.sequence for span in plan.spans] == [0, 1, 2]
    assert scheduler.pools.total_free == 3
    commit(scheduler, plan)
    scheduler.next_sweep()
    assert scheduler.pools.total_free == 0


def test_the_last_to_come_gives_its_pages_away():
    """Without free pages the newest sequence goes back to wait, and is computed again."""
    scheduler = make_scheduler(pages={Tier.DEVICE: 4})
    scheduler.add(0, 3, 16)
    scheduler.add(1, 3, 16)
    seen = []
    while not (plan := scheduler.next_sweep()).empty:
        seen.append([(span.sequence, span.start, span.length) for span in plan.spans])
        ending = [s for s in scheduler.running if scheduler.running[s].tokens == 15]
        commit(scheduler, plan, tuple(ending))
    assert scheduler.preemption.count == 1
    assert [(0, 0, 3), (1, 0, 3)] in seen
    assert [(0, 8, 1)] in seen, "the third page of the first one is the second one's"
    (again,) = (each for each in seen[1:] if (1, 0) in {row[:2] for row in each})
    assert again == [(1, 0, 9)], "its tokens are a prompt now"
    assert seen[-1] == [(1, 14, 1)]


def test_the_first_to_come_is_never_preempted():
    """Sequences give pages to those that came before them only: the oldest always goes on."""
    scheduler = make_scheduler(pages={Tier.DEVICE: 7}, page_tokens=1)
    for number in range(3):
        scheduler.add(number, 1, 7)
    oldest = []
    while not (plan := scheduler.next_sweep()).empty:
        first = min(scheduler.running)
        oldest.append(first in {span.sequence for span in plan.spans})
        ending = [s for s in scheduler.running if scheduler.running[s].tokens == 6]
        commit(scheduler, plan, tuple(ending))
    assert all(oldest)
    assert scheduler.preemption.count > 0


def test_a_waiting_sequence_can_be_finished():
    """A sequence that is ended before it ran never runs and holds no pages."""
    scheduler = make_scheduler()
    scheduler.add(0, 3, 9)
    scheduler.add(1, 3, 9)
    scheduler.finish(0)
    assert [span.sequence for span in scheduler.next_sweep().spans] == [1]
    assert 0 not in scheduler.pools.tables


@pytest.mark.parametrize("wanted", [1, 2, 3, 5])
def test_sweeps_are_cut_into_micro_batches_of_about_equal_size(wanted):
    """Thirty decodes are cut into as many micro-batches as asked for, none much larger."""
    scheduler = make_scheduler(max_sequences=30, num_micro_batches=wanted)
    for number in range(30):
        scheduler.add(number, 1, 9)
    rows = [batch.rows for batch in scheduler.next_sweep().micro_batches]
    assert rows == [30 // wanted] * wanted


def test_micro_batches_hold_no_more_pages_than_staging():
    """HOST pages of one micro-batch fit into the staging that they travel through."""
    scheduler = make_scheduler(pages={Tier.HOST: MANY}, staging=5, max_sequences=6)
    for number in range(6):
        scheduler.add(number, 7, 12)  # two pages now, three later
    plan = scheduler.next_sweep()
    assert [len(batch.spans) for batch in plan.micro_batches] == [2, 2, 2]


def random_run(
    draw: random.Random, kind: type[BatchScheduler] = ContinuousScheduler
) -> tuple[BatchScheduler, dict[int, tuple[int, int]]]:
    """A scheduler with sequences waiting, and each one's prompt and most tokens."""
    scheduler = make_scheduler(
        pages={Tier.DEVICE: draw.randint(12, 30), Tier.HOST: draw.randint(12, 30)},
        staging=draw.choice([None, 12]),
        page_tokens=draw.choice([1, 3, 4]) if draw.random() < 0.5 else 16,
        max_rows=draw.randint(1, 40),
        max_sequences=draw.randint(1, 9),
        micro_batch_rows=draw.randint(1, 20),
        num_micro_batches=draw.choice([None, 1, 2, 3]),
        order=draw.choice(["input", "longest"]),
        kind=kind,
    )
    jobs = {}
    for number in range(20):
        prompt = draw.randint(1, 9)
        jobs[number] = (prompt, prompt + draw.randint(1, 3))
        scheduler.add(number, *jobs[number])
    return scheduler, jobs


def check_plan(scheduler: BatchScheduler, plan: SweepPlan) -> None:
    """No limit is exceeded, and a sequence rides once."""
    assert 0 < plan.rows <= scheduler.max_rows
    assert len(scheduler.running) <= scheduler.max_sequences
    spans = plan.spans
    assert len({span.sequence for span in spans}) == len(spans)
    for batch in plan.micro_batches:
        assert 0 < batch.rows <= scheduler.cutter.most_rows
        pages: Counter[Tier] = Counter()
        for span in batch.spans:
            table, count = (
                scheduler.pools.tables[span.sequence],
                scheduler.pools.pages_for(span.end),
            )
            pages.update(page.tier for page in table.pages[:count])
            assert count == len(table.pages)
        for tier, limit in scheduler.pools.largest_table.items():
            assert pages[tier] <= limit


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", SCHEDULERS.values(), ids=SCHEDULERS)
def test_any_job_computes_every_position(seed, kind):
    """Under random limits positions are computed in order, once but for sequences that had to give
    their pages away, and all pages come back.
    """
    draw = random.Random(seed)
    scheduler, jobs = random_run(draw, kind)
    free = {tier: scheduler.pools.free_pages(tier) for tier in Tier}
    computed: dict[int, int] = dict.fromkeys(jobs, 0)
    tokens = {number: prompt for number, (prompt, _) in jobs.items()}
    joined: list[int] = []
    while not (plan := scheduler.next_sweep()).empty:
        check_plan(scheduler, plan)
        scheduler.commit(plan)
        for span in plan.spans:
            if span.start == 0:
                joined.append(span.sequence)
                computed[span.sequence] = 0
            assert span.start == computed[span.sequence]
            computed[span.sequence] = span.end
            assert span.wants_logits == (span.end == tokens[span.sequence])
            if span.wants_logits:
                tokens[span.sequence] += 1
                if tokens[span.sequence] == jobs[span.sequence][1]:
                    scheduler.finish(span.sequence)
    assert computed == {number: most - 1 for number, (_, most) in jobs.items()}
    assert set(joined) == set(jobs)
    assert len(joined) <= len(jobs) + scheduler.preemption.count
    assert len(joined) > len(jobs) or not scheduler.preemption.count
    assert {tier: scheduler.pools.free_pages(tier) for tier in Tier} == free


def test_a_plan_is_last_when_every_sequence_gets_its_last_token():
    """The sweep that brings all running sequences to their most tokens is marked, no other is."""
    scheduler = make_scheduler()
    scheduler.add(0, 5, 7)
    scheduler.add(1, 3, 6)
    lasts = []
    for ending in ((), (0,), (1,)):
        plan = scheduler.next_sweep()
        lasts.append(plan.last)
        commit(scheduler, plan, ending)
    assert lasts == [False, False, True]
    assert scheduler.next_sweep().empty


def test_a_plan_is_not_last_while_sequences_wait():
    """A sequence that waits for a place has a sweep to come, whatever the running ones do."""
    scheduler = make_scheduler(max_sequences=1)
    scheduler.add(0, 5, 6)
    scheduler.add(1, 5, 6)
    first = scheduler.next_sweep()
    commit(scheduler, first, (0,))
    second = scheduler.next_sweep()
    assert (first.last, second.last) == (False, True)


def test_a_plan_is_not_last_while_a_sequence_sits_out():
    """A running sequence without a row in this sweep has a sweep to come."""
    scheduler = make_scheduler(max_sequences=2)
    for number in range(2):
        scheduler.add(number, 1, 3)
    commit(scheduler, scheduler.next_sweep())
    scheduler.max_rows = 1
    lasts = []
    for _ in range(2):
        plan = scheduler.next_sweep()
        lasts.append(plan.last)
        commit(scheduler, plan, tuple(span.sequence for span in plan.spans))
    assert lasts == [False, True]


def test_a_chunk_of_a_prompt_is_not_last():
    """A prompt of which rows are left has a sweep to come, although one token is wanted."""
    scheduler = make_scheduler(micro_batch_rows=4)
    scheduler.add(0, 10, 11)
    lasts = []
    for _ in range(3):
        plan = scheduler.next_sweep()
        lasts.append(plan.last)
        commit(scheduler, plan)
    assert lasts == [False, False, True]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("early", [0.0, 0.3], ids=["full-length", "end-tokens"])
@pytest.mark.parametrize("kind", SCHEDULERS.values(), ids=SCHEDULERS)
def test_after_a_last_plan_nothing_is_left(seed, early, kind):
    """Nothing follows a plan marked last; without end tokens the final plan always is marked.

    With them sequences end early, waiting ones are given up and new ones come: a plan that was not
    marked may be the final one, but one that was marked is.
    """
    draw = random.Random(seed)
    scheduler, jobs = random_run(draw, kind)
    lasts, number = [], len(jobs)
    while not (plan := scheduler.next_sweep()).empty:
        lasts.append(plan.last)
        scheduler.commit(plan)
        for span in plan.spans:
            if span.sequence not in scheduler.running or not span.wants_logits:
                continue
            progress = scheduler.running[span.sequence]
            if progress.tokens == progress.most_tokens or draw.random() < early:
                scheduler.finish(span.sequence)
            if scheduler.waiting and draw.random() < early / 3:
                scheduler.finish(list(scheduler.waiting)[-1].sequence)
        # A job's next lines come while others still wait.
        if scheduler.waiting and number < 30 and draw.random() < early:
            scheduler.add(number, 3, 4 + draw.randint(0, 3))
            number += 1
    assert not any(lasts[:-1])
    assert lasts[-1] or early
    assert not scheduler.running
    assert not scheduler.waiting


def test_a_group_computes_its_prompt_once():
    """The others wait for it, let those behind them go ahead, and share all but the last row."""
    scheduler = make_scheduler(max_rows=6)
    for sequence in (1, 2, 3):
        scheduler.add(sequence, 9, 20, group=1)
    scheduler.add(4, 1, 20)
    plan = scheduler.next_sweep()
    assert plan.spans == [RowSpan(1, 0, 6, False)]
    commit(scheduler, plan)
    plan = scheduler.next_sweep()
    assert plan.spans == [RowSpan(1, 6, 3, True), RowSpan(4, 0, 1, True)]
    commit(scheduler, plan)
    plan = scheduler.next_sweep()
    assert sorted(plan.spans, key=lambda s: s.sequence) == [
        RowSpan(1, 9, 1, True),
        RowSpan(2, 8, 1, True),
        RowSpan(3, 8, 1, True),
        RowSpan(4, 1, 1, True),
    ]
    tables = scheduler.pools.tables
    assert tables[1].pages[:2] == tables[2].pages[:2] == tables[3].pages[:2]
    commit(scheduler, plan)


def test_a_group_whose_first_is_over_computes_its_prompt_again():
    scheduler = make_scheduler(max_sequences=1)
    for sequence in (1, 2):
        scheduler.add(sequence, 9, 20, group=1)
    commit(scheduler, scheduler.next_sweep(), ending=(1,))
    assert scheduler.next_sweep().spans == [RowSpan(2, 0, 9, True)]


@pytest.mark.parametrize(("groups", "count", "most"), [(20, 4, 10), (30, 8, 16)])
def test_prompts_are_computed_once_however_many_wait(groups, count, most):
    """More groups than sequences may run: those that wait for a prompt keep their place."""
    scheduler = make_scheduler(max_sequences=most)
    for number in range(groups * count):
        scheduler.add(number, 9, 12, group=number // count * count)
    computed = 0
    while not (plan := scheduler.next_sweep()).empty:
        scheduler.pools.take_copies()
        computed += sum(span.start == 0 for span in plan.spans)
        ending = [s.sequence for s in plan.spans if s.end == 11]
        commit(scheduler, plan, tuple(ending))
    assert computed == groups


def test_copies_of_shared_pages_are_counted_before_sequences_start():
    """Nobody is admitted whose copy of a page takes what others need next."""
    scheduler = make_scheduler(pages={Tier.DEVICE: 12}, max_sequences=8)
    for number in range(8):
        scheduler.add(number, 15, 18, group=0)
    while not (plan := scheduler.next_sweep()).empty:
        scheduler.pools.take_copies()
        ending = [s.sequence for s in plan.spans if s.end == 17]
        commit(scheduler, plan, tuple(ending))
    assert scheduler.preemption.count == 0


def test_pages_move_up_when_nothing_waits():
    """Full ones, from the slowest tier first, as long as DEVICE has more than is wanted soon."""
    scheduler = make_scheduler(pages={Tier.DEVICE: 6, Tier.HOST: 6}, max_sequences=3)
    scheduler.promoted_from = (Tier.HOST,)
    for sequence in range(3):
        scheduler.add(sequence, 9, 40)
    commit(scheduler, scheduler.next_sweep(), ending=(0,))
    pages = [page for table in scheduler.pools.tables.values() for page in table.pages[:2]]
    assert {page.tier for page in pages} == {Tier.DEVICE, Tier.HOST}
    scheduler.add(9, 9, 40)
    scheduler.max_sequences = 2
    commit(scheduler, scheduler.next_sweep())
    assert scheduler.promotions == 0, "another sequence wants the room"
    scheduler.finish(9)
    scheduler.next_sweep()
    assert scheduler.promotions > 0


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", SCHEDULERS.values(), ids=SCHEDULERS)
def test_any_job_with_groups_computes_every_position(seed, kind):
    """However few pages there are, every sequence computes, or shares, all its positions once."""
    draw = random.Random(seed)
    scheduler = make_scheduler(
        pages={Tier.DEVICE: draw.randint(5, 20), Tier.HOST: draw.randint(4, 10)},
        max_rows=draw.randint(3, 40),
        micro_batch_rows=draw.randint(3, 40),
        max_sequences=draw.randint(1, 8),
        kind=kind,
    )
    scheduler.promoted_from = (Tier.HOST,)
    left, number = {}, 0
    for _ in range(8):
        prompt, count = draw.randint(1, 12), draw.choice([1, 1, 2, 4])
        group = number if count > 1 else None
        for _ in range(count):
            left[number] = draw.randint(1, 8)
            scheduler.add(number, prompt, prompt + left[number], group)
            number += 1
    for _ in range(5000):
        plan = scheduler.next_sweep()
        if plan.empty:
            break
        for span in plan.spans:
            assert scheduler.running[span.sequence].computed == span.start
            assert len(scheduler.pools.tables[span.sequence].pages) * 4 >= span.end
        scheduler.pools.take_copies()
        ending = []
        for span in plan.spans:
            if span.wants_logits:
                left[span.sequence] -= 1
                if not left[span.sequence]:
                    ending.append(span.sequence)
        commit(scheduler, plan, tuple(ending))
    assert set(left.values()) == {0}
    scheduler.pools.settle()
    assert scheduler.pools.total_free == sum(scheduler.pools.capacity.values())


def test_phases_do_not_mix():
    """Prompts are computed first, and again as soon as there is a place; then tokens alone."""
    scheduler = make_scheduler(max_sequences=2, max_rows=4, kind=PhasedScheduler)
    for number in range(3):
        scheduler.add(number, 4, 12)
    seen = []
    for ending in ((), (), (), (0,), (), ()):
        plan = scheduler.next_sweep()
        seen.append([(span.sequence, span.length) for span in plan.spans])
        commit(scheduler, plan, ending)
    both = [(0, 1), (1, 1)]
    assert seen == [[(0, 4)], [(1, 4)], both, both, [(2, 4)], [(1, 1), (2, 1)]]


def test_a_block_is_over_before_the_next_one_begins():
    """Places of sequences that ended stay empty; prompts come first, and all decode together."""
    scheduler = make_scheduler(max_sequences=2, max_rows=4, kind=StaticScheduler)
    for number in range(3):
        scheduler.add(number, 4, 12)
    seen = []
    for ending in ((), (), (0,), (), (1,), (2,)):
        plan = scheduler.next_sweep()
        seen.append([(span.sequence, span.length) for span in plan.spans])
        commit(scheduler, plan, ending)
    assert seen == [[(0, 4)], [(1, 4)], [(0, 1), (1, 1)], [(1, 1)], [(1, 1)], [(2, 4)]]


def test_a_place_left_while_the_block_is_filled_stays_empty():
    """A sequence that ends with its first token is part of the block all the same."""
    scheduler = make_scheduler(max_sequences=3, max_rows=8, kind=StaticScheduler)
    for number in range(5):
        scheduler.add(number, 4, 12)
    joined = []
    for ending in ((0,), (), (1, 2), ()):
        plan = scheduler.next_sweep()
        joined.append([span.sequence for span in plan.spans])
        commit(scheduler, plan, ending)
    assert joined == [[0, 1], [2], [1, 2], [3, 4]]


def test_a_block_keeps_room_for_whole_lengths():
    """A sequence joins only if all its tokens have pages, so none is ever preempted."""
    scheduler = make_scheduler(pages={Tier.DEVICE: 7}, kind=StaticScheduler)
    for number in range(4):
        scheduler.add(number, 4, 12)  # three pages each
    sweeps = 0
    while not (plan := scheduler.next_sweep()).empty:
        sweeps += 1
        assert len(scheduler.running) <= 2
        ending = [s.sequence for s in plan.spans if s.end == 11]
        commit(scheduler, plan, tuple(ending))
    assert (scheduler.preemption.count, sweeps) == (0, 16)


FREE = {"same": 320, "different": 250}
"""Rows that compute in the second that weights take; about what keeps all places generating."""


def seconds_of(job: str, free_rows: int | None, learning: bool = False) -> float:
    """Of a job whose scheduler thinks that so many rows are free, or learns better."""
    lengths, places, most = [(512, 128)] * 256, 64, 128
    if job == "different":
        draw, places, most = random.Random(0), 8, 1000
        lengths = [(draw.randint(1, 800), draw.randint(1, 32)) for _ in range(200)]
    scheduler = make_scheduler(
        max_rows=2048, micro_batch_rows=2048, max_sequences=places, page_tokens=16
    )
    scheduler.free_rows = free_rows
    left = {}
    for number, (prompt, output) in enumerate(lengths):
        left[number] = output
        scheduler.add(number, prompt, prompt + most)
    seconds, computed, sweeps = 0.0, 0.0, 0
    budget = None
    if learning:
        budget = RowBudget(scheduler, 1.0, free_rows or 0, prompts=True, guess=False)
    while (plan := scheduler.next_sweep()).spans:
        seconds += max(1.0, plan.rows / FREE[job])
        computed, sweeps = computed + plan.rows / FREE[job], sweeps + 1
        if budget is not None:
            budget.learn(plan.rows, computed, [float(sweeps)], [float(sweeps)])
        for span in plan.spans:
            left[span.sequence] -= span.wants_logits
        commit(scheduler, plan, tuple(n for n, tokens in left.items() if not tokens))
    return seconds


@pytest.mark.parametrize("job", FREE)
def test_prompts_take_the_rows_that_are_free(job):
    """Sweeps that take as long as their weights are the job's shortest way, not full ones.

    Also where all outputs are as long: sequences that began together would end together.
    """
    assert seconds_of(job, FREE[job]) < 0.85 * seconds_of(job, None)


@pytest.mark.parametrize("job", FREE)
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_places_do_not_stay_empty_for_rows_that_are_not_free(job, share):
    """If fewer rows seem free than are, prompts take what the job's sequences so far needed."""
    assert seconds_of(job, int(share * FREE[job])) < 1.25 * seconds_of(job, FREE[job])


@pytest.mark.parametrize("job", FREE)
@pytest.mark.parametrize("share", [0, 0.2, 0.5, 4])
def test_a_wrong_belief_costs_little(job, share):
    """A few sweeps correct what was believed before the first one, too little or too much."""
    known = seconds_of(job, FREE[job])
    assert seconds_of(job, int(share * FREE[job]), learning=True) < 1.1 * known


def test_prompts_of_a_single_block_are_computed_at_once():
    """With nobody to wait for their places, they would only begin later; nor where the places take
    all rows that are free.
    """
    for free, waiting, rows in ((300, 8, 320), (300, 20, 300), (10, 20, 320)):
        scheduler = make_scheduler(max_sequences=8, max_rows=320, micro_batch_rows=320)
        scheduler.free_rows = free
        for number in range(waiting):
            scheduler.add(number, 100, 110)
        assert scheduler.next_sweep().rows == rows


def test_prompts_keep_no_more_places_than_there_are_pages_for():
    """Of 64 places pages suffice for 16: these need a quarter of the rows."""
    pages = {Tier.DEVICE: 16 * 640 // 16}
    scheduler = make_scheduler(max_sequences=64, page_tokens=16, pages=pages)
    for number in range(4):
        scheduler.add(number, 512, 2000)
        while scheduler.running or scheduler.waiting:
            plan = scheduler.next_sweep()
            ends = (number,) if scheduler.running[number].tokens == 512 + 127 else ()
            commit(scheduler, plan, ends)
    places = 16 * 640 / (640 - 128 / 2)  # half of what is generated is there, on average
    assert scheduler.prompt_rows() == pytest.approx(1.5 * (places - 1) * 512 / 128)


@pytest.mark.parametrize(
    ("generating", "prompt", "rows"),
    [(7, 100, 7 * 10), (5, 100, 8 * 10), (0, 100, 105), (7, 40, 32)],
)
def test_prompts_take_more_rows_where_few_generate(generating, prompt, rows):
    """One of eight places is for the prompt, and half of what is missing comes on top."""
    scheduler = make_scheduler(max_sequences=8, max_rows=MANY, micro_batch_rows=MANY)
    for number in range(generating):
        scheduler.add(number, prompt, prompt + 10)
    commit(scheduler, scheduler.next_sweep())
    scheduler.free_rows = 8 + 27  # a quarter of 105 beside what places take
    for number in range(8, 24):
        scheduler.add(number, prompt, prompt + 10)
    plan = scheduler.next_sweep()
    assert sum(span.sequence < 8 for span in plan.spans) == generating
    assert plan.rows == generating + rows


def test_prompts_take_more_rows_where_pages_are_for_hardly_more_than_one():
    """Of 1.2 places none can be kept for a prompt."""
    scheduler = make_scheduler(pages={Tier.DEVICE: 9}, max_sequences=4)
    scheduler.add(0, 20, 30)
    while scheduler.running or scheduler.waiting:
        plan = scheduler.next_sweep()
        commit(scheduler, plan, (0,) if plan.spans[0].end == 29 else ())
    assert 36 / scheduler.turnover.held < 2
    assert scheduler.prompt_rows() == 1.5 * 20 / 10


def test_a_prompt_that_is_shared_counts_once():
    """Of eight completions of a prompt, seven compute its last row only, like any next token's."""
    scheduler = make_scheduler(max_sequences=8)
    for number in range(8):
        scheduler.add(number, 33, 100, group=0)
    places = 7 + 7 / 2  # none generates
    assert scheduler.prompt_rows() == pytest.approx(places * (33 + 7) / (8 * (100 - 33)))
    while scheduler.running or scheduler.waiting:
        plan = scheduler.next_sweep()
        ends = tuple(n for n, p in scheduler.running.items() if p.tokens == 33 + 9)
        commit(scheduler, plan, ends)
    assert scheduler.prompt_rows() == pytest.approx(places * 33 / (8 * 10))


def test_what_is_computed_again_counts_again():
    """A sequence that gave its pages away computes 12 positions as if they were a prompt."""
    scheduler = make_scheduler(pages={Tier.DEVICE: 8}, max_sequences=1)
    scheduler.add(0, 9, 1000)
    for _ in range(4):
        commit(scheduler, scheduler.next_sweep())
    scheduler.preempt(0)
    commit(scheduler, scheduler.next_sweep(), ending=(0,))
    assert scheduler.prompt_rows() == pytest.approx(1.5 * (9 + 13) / 5)


def test_another_job_is_not_like_the_one_before():
    scheduler = make_scheduler(max_sequences=1)
    for job in ((40, 2), (2, 40)):
        scheduler.add(0, job[0], sum(job))
        assert scheduler.prompt_rows() == pytest.approx(1.5 * job[0] / job[1])
        while scheduler.running or scheduler.waiting:
            progress = scheduler.running.get(0)
            last = progress is not None and progress.tokens == sum(job) - 1
            commit(scheduler, scheduler.next_sweep(), ending=(0,) if last else ())


@pytest.mark.parametrize("order", ["longest", "input"])
def test_the_longest_go_first(order):
    """Who may generate most starts first, and with equal lengths, or if asked, who came first."""
    scheduler = make_scheduler(max_sequences=1, order=order)
    for number, (prompt, most) in enumerate([(50, 55), (2, 9), (3, 30), (4, 31), (1, 3)]):
        scheduler.add(number, prompt, most)
    started = []
    while not (plan := scheduler.next_sweep()).empty:
        started += [span.sequence for span in plan.spans]
        commit(scheduler, plan, tuple(span.sequence for span in plan.spans))
    assert started == ([2, 3, 1, 0, 4] if order == "longest" else [0, 1, 2, 3, 4])


def test_a_prompt_that_was_computed_elsewhere_is_not_computed_again():
    """The sequence waits for pages with its prompt's positions computed, then has single rows."""
    scheduler = make_scheduler(pages={Tier.DEVICE: 6}, max_rows=64)
    scheduler.add(0, 16, 20)
    scheduler.add(1, 9, 12, computed=8)
    first = scheduler.next_sweep()
    assert first.spans == [RowSpan(0, 0, 16, True)], "no pages are left for the other one"
    commit(scheduler, first, ending=(0,))
    assert scheduler.next_sweep().spans == [RowSpan(1, 8, 1, True)]
    assert scheduler.pools.tables[1].tokens == 9


@pytest.mark.parametrize("kind", [ContinuousScheduler, PhasedScheduler])
def test_whose_prompt_was_computed_elsewhere_rides_with_those_that_generate(kind):
    """There is no prompt to compute, so nobody waits for one."""
    scheduler = make_scheduler(kind=kind)
    scheduler.add(0, 9, 12, computed=8)
    commit(scheduler, scheduler.next_sweep())
    scheduler.add(1, 5, 12, computed=4)
    rows = sorted(scheduler.next_sweep().spans)
    assert rows == [RowSpan(0, 9, 1, True), RowSpan(1, 4, 1, True)]


def test_what_was_handed_over_is_lost_with_its_pages():
    """Whoever gives its pages away computes all its tokens again, wherever it began."""
    scheduler = make_scheduler()
    scheduler.add(0, 9, 12, computed=8)
    commit(scheduler, scheduler.next_sweep())
    scheduler.preempt(0)
    assert scheduler.next_sweep().spans == [RowSpan(0, 0, 10, True)]


def test_who_was_preempted_goes_before_longer_ones():
    scheduler = make_scheduler(pages={Tier.DEVICE: 4}, order="longest")
    scheduler.add(0, 3, 16)
    scheduler.add(1, 3, 15)
    while not scheduler.preemption.count:
        commit(scheduler, scheduler.next_sweep())
    scheduler.add(2, 3, 99)
    assert [progress.sequence for progress in scheduler.waiting] == [1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_are_about_as_much_work(seed):
    """Rows differ by no more than one span has, and context of single rows by less than one has."""
    draw = random.Random(seed)
    scheduler = make_scheduler(micro_batch_rows=draw.randint(40, 90), num_micro_batches=4)
    spans = [RowSpan(number, draw.randint(0, 900), 1, True) for number in range(100)]
    rows = [sum(s.length for s in b.spans) for b in scheduler.cutter.cut(spans, 100)]
    assert len(rows) == 4
    assert max(rows) - min(rows) <= 1
    context = [sum(s.end for s in b.spans) for b in scheduler.cutter.cut(spans, 100)]
    assert max(context) - min(context) <= 901
    spans += [RowSpan(100 + n, 0, draw.randint(2, 40), False) for n in range(5)]
    total = sum(span.length for span in spans)
    batches = scheduler.cutter.cut(spans, total)
    assert sorted(s for b in batches for s in b.spans) == sorted(spans)
    assert max(b.rows for b in batches) - min(b.rows for b in batches) <= 40


def running_scheduler(count: int, **settings: Any) -> BatchScheduler:
    """`count` sequences with prompts of three tokens that were computed."""
    scheduler = make_scheduler(max_sequences=count, **settings)
    for number in range(count):
        scheduler.add(number, 3, 12)
    commit(scheduler, scheduler.next_sweep())
    return scheduler


def test_guessed_tokens_fill_the_rows_that_are_free():
    """Behind the newest row of each sequence, in order, as far as the free rows go."""
    scheduler = running_scheduler(3)
    scheduler.speculation.most_rows = 8
    spans = scheduler.next_sweep({0: 2, 1: 4, 2: 4}).spans
    assert sorted(spans) == [
        RowSpan(0, 3, 3, True, 2),
        RowSpan(1, 3, 4, True, 3),
        RowSpan(2, 3, 1, True),
    ]


def test_only_right_guesses_count():
    """After a sweep a sequence goes on behind the last guess that was right, and one token more."""
    scheduler = running_scheduler(2)
    scheduler.speculation.most_rows = 64
    plan = scheduler.next_sweep({0: 4, 1: 3})
    scheduler.commit(plan, {0: 2, 1: 3})
    assert sorted(scheduler.next_sweep().spans) == [
        RowSpan(0, 6, 1, True),
        RowSpan(1, 7, 1, True),
    ]


def test_no_more_is_guessed_than_may_be_generated():
    scheduler = running_scheduler(1)  # eight tokens to come, one of them from the newest row
    scheduler.speculation.most_rows = 64
    assert scheduler.next_sweep({0: 50}).spans == [RowSpan(0, 3, 8, True, 7)]


def test_guesses_take_no_page_that_others_want():
    """With no page to spare, guessed tokens take what their sequence's last page has room for."""
    scheduler = running_scheduler(2, pages={Tier.DEVICE: 4})
    scheduler.speculation.most_rows = 64
    assert sorted(scheduler.next_sweep({0: 5, 1: 5}).spans) == [
        RowSpan(0, 3, 1, True),
        RowSpan(1, 3, 1, True),
    ]
    assert scheduler.pools.total_free == 2


def test_prompts_go_before_guesses():
    """A sequence that waits gets the rows; what it leaves is for guesses."""
    scheduler = running_scheduler(2, max_rows=10)
    scheduler.max_sequences = 3
    scheduler.speculation.most_rows = 10
    scheduler.add(9, 7, 12)
    spans = sorted(scheduler.next_sweep({0: 5, 1: 5}).spans)
    assert spans == [RowSpan(0, 3, 2, True, 1), RowSpan(1, 3, 1, True), RowSpan(9, 0, 7, True)]


def test_pages_on_disk_hold_no_guess_when_they_are_full():
    """The page that becomes full in a sweep is written then: guesses end before that."""
    pools = PagePools({Tier.DISK: 100}, 4, tails=4)
    scheduler = ContinuousScheduler(pools, max_rows=64, max_sequences=4, micro_batch_rows=64)
    scheduler.speculation.most_rows = 64
    for number, prompt in enumerate((1, 2, 3, 4)):
        scheduler.add(number, prompt, 40)
    commit(scheduler, scheduler.next_sweep())
    spans = scheduler.next_sweep(dict.fromkeys(range(4), 9)).spans
    assert any(span.drafts for span in spans)
    for span in spans:
        true_end = span.end - span.drafts
        assert span.end // 4 == true_end // 4 or true_end % 4 == 0


@pytest.mark.parametrize("seed", range(30))
def test_any_job_with_guesses_computes_every_position(seed):
    """However many guesses are right, a sequence's rows follow each other without a gap."""
    draw = random.Random(seed)
    scheduler, jobs = random_run(draw)
    scheduler.speculation.most_rows = draw.randint(1, 60)
    tokens = {number: prompt for number, (prompt, _) in jobs.items()}
    computed = dict.fromkeys(jobs, 0)
    sweeps = 0
    while not (plan := scheduler.next_sweep({n: draw.randint(0, 4) for n in jobs})).empty:
        sweeps += 1
        assert 0 < plan.rows <= scheduler.max_rows
        right = {span.sequence: draw.randint(0, span.drafts) for span in plan.spans}
        scheduler.commit(plan, right)
        for span in plan.spans:
            number = span.sequence
            assert span.start in (0, computed[number])
            computed[number] = span.end - span.drafts + right[number]
            if span.wants_logits:
                assert span.end - span.drafts == tokens[number]
                tokens[number] += 1 + right[number]
                assert tokens[number] <= jobs[number][1]
                if tokens[number] == jobs[number][1]:
                    scheduler.finish(number)
    assert tokens == {number: most for number, (_, most) in jobs.items()}
    assert scheduler.pools.total_free == sum(scheduler.pools.capacity.values())


def test_a_guess_takes_no_more_pages_than_there_are_to_spare():
    """Pages of two tokens: one to spare holds no guess that would need three."""
    scheduler = make_scheduler(pages={Tier.DEVICE: 4}, page_tokens=2, max_sequences=1)
    scheduler.speculation.most_rows = 64
    scheduler.add(0, 3, 40)
    commit(scheduler, scheduler.next_sweep())
    assert scheduler.next_sweep({0: 6}).spans == [RowSpan(0, 3, 1, True)]
    assert scheduler.pools.total_free == 2


def test_policies_know_all_schedulers():
    assert set(SCHEDULERS) == set(CHOICES["scheduler"])


def run_until(most: int, sweeps: int) -> tuple[BatchScheduler, SweepPlan]:
    """Two sequences, the second with `most` tokens, in ten pages of four, with some to swap to."""
    pools = PagePools({Tier.DEVICE: 10, Tier.HOST: 8}, 4, swap=Tier.HOST)
    scheduler = ContinuousScheduler(pools, max_rows=64, max_sequences=8, micro_batch_rows=64)
    scheduler.preemption.swapping_is_cheaper = lambda _: True
    scheduler.add(0, 15, 40)
    scheduler.add(1, 14, most)
    for _ in range(sweeps):
        plan = scheduler.next_sweep()
        ending = [s.sequence for s in plan.spans if s.sequence and s.end == most - 1]
        if len(plan.spans) == 2:
            assert not scheduler.pools.take_copies()
            commit(scheduler, plan, tuple(ending))
    return scheduler, plan


def test_pages_move_a_sweep_before_they_are_missed():
    """With its next row the first one's pages are full, and none is free: the last to come leaves
    while that row is computed, and comes back with what its full pages hold.
    """
    scheduler, plan = run_until(40, 6)
    assert plan.spans == [RowSpan(0, 19, 1, True)]
    assert (scheduler.preemption.count, scheduler.preemption.swaps) == (1, 1)
    assert len(scheduler.pools.take_copies()) == 4
    commit(scheduler, plan)
    assert scheduler.next_sweep().spans == [RowSpan(0, 20, 1, True)]
    scheduler.finish(0)
    assert scheduler.next_sweep().spans == [RowSpan(1, 16, 3, True)]


def test_who_ends_in_this_sweep_does_not_leave():
    """The last to come gets its last token in that sweep: its pages are free after it."""
    scheduler, plan = run_until(20, 6)
    assert [span.sequence for span in plan.spans] == [0, 1]
    assert scheduler.preemption.count == 0
    assert [span.sequence for span in scheduler.next_sweep().spans] == [0]


def test_first_pages_that_stay_keep_no_others_from_moving_up():
    """Where pages are packed, forty sequences have one each that nobody reads on HOST."""
    pools = PagePools({Tier.DEVICE: 600, Tier.HOST: 600}, 4, tails=40, keeps_recent=True)
    scheduler = ContinuousScheduler(pools, max_rows=600, max_sequences=40, micro_batch_rows=600)
    scheduler.promoted_from = (Tier.HOST,)
    for number in range(40):
        scheduler.add(number, 12, 40)
    for _ in range(12):
        pools.settle()
        scheduler.commit(scheduler.next_sweep())
        pools.take_copies()
    tables = [pools.tables[number] for number in range(40)]
    first = [table.pages[0].tier for table in tables]
    assert first.count(Tier.HOST) > 16
    full = [page.tier for table in tables for page in table.pages[1 : table.tokens // 4 - 1]]
    assert full.count(Tier.HOST) == 0
