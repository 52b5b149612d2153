"""Whether prompts are spread over sweeps where that pays, on a virtual clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flexrun.schedulers import ContinuousScheduler
from offload.pages import PagePools
from offload.tiers import Tier
from policy_search.simulator import simulate
from policy_search.sweep_load import COMPUTE, SweepTerms
from policy_search.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from policy_search.sweep_load import SweepLoad

PLACES = 16
FIXED = 20
"""Rows that compute as long as what each sweep takes besides."""
JOBS = {
    "long prompts": lambda n: Workload(workload="fixed", prompt_len=1024, gen_len=32, requests=n),
    "short prompts": lambda n: Workload(workload="fixed", prompt_len=64, gen_len=16, requests=n),
    "conversations": lambda n: Workload(workload="conv", scale=0.25, requests=n),
}


class Always(ContinuousScheduler):
    """Prompts take the rows that are free, or that they need, whatever they cost."""

    def _spreads(self, free: int, needed: int) -> bool:
        return True


def cost(arriving: float) -> Callable[[SweepLoad], SweepTerms]:
    """Of weights that arrive while so many rows compute."""

    def terms(load: SweepLoad) -> SweepTerms:
        computing = FIXED + load.rows
        return SweepTerms(max(arriving, computing), {COMPUTE: computing})

    return terms


def seconds(
    kind: type[ContinuousScheduler], job: Workload, arriving: int, free: int | None
) -> float:
    pools = PagePools({Tier.DEVICE: 10**5}, 32, tails=PLACES)
    scheduler = kind(pools, max_rows=2048, max_sequences=PLACES, micro_batch_rows=512)
    scheduler.free_rows = free
    lengths = job.lengths()
    return simulate(scheduler, lengths, cost(arriving), max_tokens=job.max_tokens).makespan_seconds


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("blocks", [1, 1.5, 4])
@pytest.mark.parametrize("arriving", [10, 40, 100, 300, 1000])
def test_prompts_are_spread_where_it_pays(name, blocks, arriving):
    """The better of both ways, or nearly; each of them can be a fifth longer than the other."""
    job, free = JOBS[name](int(blocks * PLACES)), max(1, arriving - FIXED)
    found = seconds(ContinuousScheduler, job, arriving, free)
    always = seconds(Always, job, arriving, free)
    never = seconds(ContinuousScheduler, job, arriving, None)
    assert found <= 1.08 * min(always, never)


def test_either_way_is_much_longer_somewhere():
    """Or the test above would hold for no reason."""
    one, four = JOBS["short prompts"](PLACES), JOBS["short prompts"](4 * PLACES)
    assert seconds(Always, one, 40, 20) > 1.15 * seconds(ContinuousScheduler, one, 40, None)
    assert seconds(ContinuousScheduler, four, 100, None) > 1.15 * seconds(Always, four, 100, 80)
