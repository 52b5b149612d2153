"""Which of the best plans is the quickest for a job: the scheduler itself, on a virtual clock.

The plan's closed form takes a job for as many sweeps as a steady one has, plus some. Of a job of a
few blocks, which is never steady, it has been 4 % wrong for one plan and 18 % for the next.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flexrun.schedulers import SCHEDULERS
from offload.pages import PagePools
from policy_search.cost_model import weight_seconds
from policy_search.simulator import simulate
from policy_search.sweep_cost import SweepCost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from policy_search.search import Candidate, Search

MOST_TOKENS = 500_000
"""That are generated in all rehearsals of a job, which takes about two seconds."""
MOST_PLANS = 16
MOST_ROUNDS = 4
"""Of one plan: when a long sequence begins decides how long the last ones run alone."""
CLOSE = 0.8
"""Of the best rate: what is slower by the closed form is not rehearsed."""


def quickest(search: Search, candidates: Sequence[Candidate]) -> Candidate:
    """For the job of `search`, of at least one candidate. Of those with batches of one size only
    the best by the closed form is rehearsed, and none of a job that is too large for two.
    """
    best_first = sorted(candidates, key=lambda each: -each.prediction.tokens_per_second)
    least = CLOSE * best_first[0].prediction.tokens_per_second
    batches: dict[tuple[int, int, int], Candidate] = {}
    for each in best_first:
        if each.prediction.tokens_per_second >= least:
            policy = each.policy
            batch = policy.max_sequences, policy.micro_batch_rows, policy.max_rows
            batches.setdefault(batch, each)
    tokens = max(1.0, search.job.sequences * search.job.output)
    count = min(MOST_PLANS, len(batches), int(MOST_TOKENS / tokens))
    if count < 2:
        return best_first[0]
    rounds = min(MOST_ROUNDS, int(MOST_TOKENS / tokens / count))
    finalists = list(batches.values())[:count]
    return min(finalists, key=lambda each: rehearsed_seconds(search, each, rounds))


def rehearsed_seconds(search: Search, candidate: Candidate, rounds: int = 1) -> float:
    """Of the whole job, the mean of some orders of its sequences; infinite where not all fit."""
    shape, hardware = search.shape, search.hardware
    policy, memory = candidate.policy, candidate.memory
    page_bytes = policy.page_tokens * shape.kv_token_bytes
    pages = {tier: used.kv // page_bytes for tier, used in memory.items()}
    cost = SweepCost(shape, policy, memory, hardware, unified=search.unified)
    seconds = []
    for seed in range(rounds):
        lengths = search.job.drawn(seed)
        most = max(each.output for each in lengths)
        pools = PagePools(pages, policy.page_tokens, tails=policy.max_sequences)
        if not pools.fits_ever(max(each.prompt for each in lengths) + most):
            return math.inf
        scheduler = SCHEDULERS[policy.scheduler](
            pools,
            max_rows=policy.max_rows,
            max_sequences=policy.max_sequences,
            micro_batch_rows=policy.micro_batch_rows,
            num_micro_batches=policy.num_micro_batches,
            order=policy.order,
        )
        if cost.streamed and "max_rows" not in search.given:
            arriving = weight_seconds(cost.streamed, cost.from_disk, hardware)
            scheduler.free_rows = max(1, int(cost.rows_within(arriving)))
        seconds.append(simulate(scheduler, lengths, cost.terms, max_tokens=most).makespan_seconds)
    return sum(seconds) / rounds
