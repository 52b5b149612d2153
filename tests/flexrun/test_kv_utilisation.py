"""How much of the KV pages that sequences hold has tokens in it, with real lengths."""

from __future__ import annotations

from flexrun.schedulers import ContinuousScheduler
from offload.pages import PagePools
from offload.tiers import Tier
from policy_search.policy import Policy
from policy_search.simulator import simulate
from policy_search.sweep_load import SweepTerms
from policy_search.workload import Workload


def utilisation(page_tokens: int) -> float:
    """Tokens stored over slots of pages held, over all sweeps of a job of 300 requests."""
    policy = Policy()
    pages = {Tier.DEVICE: 50_000 // page_tokens, Tier.HOST: 100_000 // page_tokens}
    scheduler = ContinuousScheduler(
        PagePools(pages, page_tokens),
        max_rows=policy.max_rows,
        max_sequences=policy.max_sequences,
        micro_batch_rows=policy.micro_batch_rows,
    )
    job = Workload(workload="conv", requests=300, known_lengths=True)
    return simulate(scheduler, job.lengths(), lambda load: SweepTerms(1.0, {})).kv_utilization


def test_pages_are_nearly_full():
    assert utilisation(Policy().page_tokens) >= 0.96
    assert utilisation(256) < 0.96, "the measure says something"
