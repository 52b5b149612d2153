"""Which of the best plans is the quickest for a job: the scheduler itself, on a virtual clock.

The plan's closed form takes a job for as many sweeps as a steady one has, plus some. Of a job of a
few blocks, which is never steady, it has been 4 % wrong for one plan and 18 % for the next.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

from flexrun.schedulers import make_scheduler
from offload.pages import PagePools
from policy_search.cost_model import weight_seconds
from policy_search.simulator import simulate
from policy_search.sweep_cost import SweepCost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from policy_search.job_pricing import Candidate
    from policy_search.search import Search
    from policy_search.workload import JobLengths

MOST_SECONDS = 2.0
"""Of all rehearsals of a job, about; how long they take is reckoned, so that plans are the same on
every day, from what a sweep and a token generated take on a common processor."""
SWEEP_SECONDS, TOKEN_SECONDS = 150e-6, 4e-6
MOST_PLANS = 16
MOST_ROUNDS = 4
"""Of one plan: when a long sequence begins decides how long the last ones run alone."""
CLOSE = 0.8
"""Of the best rate: what is slower by the closed form is not rehearsed."""


def quickest(search: Search, candidates: Sequence[Candidate]) -> Candidate | None:
    """For the job of `search`, of at least one candidate. Of those with batches of one size only
    the best by the closed form is rehearsed. None of a job that is too large for two.
    """
    finalists = _finalists(candidates)
    each_takes = [_reckoned(search.job, each) for each in finalists]
    within = sum(total <= MOST_SECONDS for total in accumulate(each_takes))
    if within < 2:
        return None
    rounds = min(MOST_ROUNDS, int(MOST_SECONDS / max(sum(each_takes[:within]), 1e-9)))
    if search.job.longest <= search.job.output:
        rounds = 1  # which are all the same
    return min(finalists[:within], key=lambda each: rehearsed_seconds(search, each, rounds))


def _finalists(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best first."""
    best_first = sorted(candidates, key=lambda each: -each.prediction.tokens_per_second)
    least = CLOSE * best_first[0].prediction.tokens_per_second
    batches: dict[tuple[int, ...], Candidate] = {}
    for each in best_first:
        if each.prediction.tokens_per_second >= least:
            policy = each.policy
            batch = policy.max_sequences, policy.micro_batch_rows, policy.max_rows
            batches.setdefault(batch, each)
    return list(batches.values())[:MOST_PLANS]


def _reckoned(job: JobLengths, candidate: Candidate) -> float:
    """Seconds of one rehearsal."""
    found = candidate.prediction
    sweeps = found.job_seconds / found.sweep_seconds if found.sweep_seconds else 0.0
    return SWEEP_SECONDS * sweeps + TOKEN_SECONDS * job.sequences * job.output


def rehearsed_seconds(search: Search, candidate: Candidate, rounds: int = 1) -> float:
    """Of the whole job, the mean of some orders of its outputs; infinite where not all fit.

    Pages are where the cost model has them, on each tier as many of every sequence: those that move
    up while a job ends, and what waits on another tier, are left out.
    """
    shape, hardware = search.shape, search.hardware
    policy, memory = candidate.policy, candidate.memory
    page_bytes = policy.page_tokens * shape.kv_token_bytes
    pages = {tier: used.kv // page_bytes for tier, used in memory.items()}
    staged = {tier: used.kv_of_one for tier, used in memory.items() if used.kv_of_one is not None}
    largest = {tier: nbytes // page_bytes for tier, nbytes in staged.items()}
    cost = SweepCost(shape, policy, memory, hardware, unified=search.unified)
    free = None
    if cost.streamed and "max_rows" not in search.given:
        arriving = weight_seconds(cost.streamed, cost.from_disk, hardware)
        free = max(1, int(cost.rows_within(arriving)))
    job, seconds = search.job, []
    most = max(1, round(max(job.output, job.longest)))
    for seed in range(rounds):
        lengths = job.drawn(seed, min(search.context, job.longest_sequence))
        pools = PagePools(pages, policy.page_tokens, largest, tails=policy.max_sequences)
        if not all(pools.fits_ever(sum(each)) for each in lengths):
            return math.inf
        scheduler = make_scheduler(policy, pools)
        scheduler.free_rows = free
        seconds.append(simulate(scheduler, lengths, cost.terms, max_tokens=most).makespan_seconds)
    return sum(seconds) / rounds
