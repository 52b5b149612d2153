"""Simpler plans for the same machine and job, which a plan is held against (no torch)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offload.errors import CapacityError
from offload.tiers import Split
from policy_search.automatic import automatic_policy

if TYPE_CHECKING:
    from policy_search.job_pricing import Candidate
    from policy_search.planner import Plan
    from policy_search.policy import Policy
    from policy_search.search import Search


def rivals(plan: Plan) -> dict[str, Candidate | None]:
    """By name; each with the number of sequences that is best for it. None: it does not fit, or has
    no room for sequences as long as the plan's longest.

    FlexGen's way is a block of sequences that is over before the next one begins, all pages in RAM
    and attended to there, with weights on the device as far as there is room.
    """
    search = plan.search
    base = search.base
    fewer = min(base.micro_batch_rows, plan.policy.micro_batch_rows)
    base = replace(base, micro_batch_rows=fewer, max_rows=min(base.max_rows, plan.policy.max_rows))
    # What fits with few rows only is given as few; who holds shorter sequences does another job.
    search = replace(search, base=base, room_for=plan.room_for)
    here, host, disk = Split(device=100), Split(host=100), Split(disk=100)
    named = {
        "all on disk": replace(search.base, weights=disk, kv_cache=disk),
        "nothing offloaded": replace(search.base, weights=here, kv_cache=here),
    }
    if not search.unified:
        named["all in RAM"] = replace(search.base, weights=host, kv_cache=host)
    found = {name: _best(search, policy) for name, policy in named.items()}
    without = search.add(replace(plan.policy, overlap=False))
    found["without overlap"] = None if isinstance(without, CapacityError) else without
    if not search.unified:
        found["FlexGen's way"] = _flexgen(search)
    return found


def _best(search: Search, policy: Policy) -> Candidate | None:
    """With the number of sequences that is best for it."""
    batches = (replace(policy, max_sequences=n) for n in search.counts())
    priced = (search.add(search.with_rows(batch)) for batch in batches)
    fitting = [each for each in priced if not isinstance(each, CapacityError)]
    return max(fitting, key=lambda each: each.prediction.tokens_per_second, default=None)


def _flexgen(search: Search) -> Candidate | None:
    """The best block: its prompts first, then as many sweeps as it generates tokens."""
    found = []
    for count in search.counts():
        base = replace(search.base, max_sequences=count, attention="host")
        known = search.shape, search.limits, base, search.context
        try:
            policy = automatic_policy(*known, unified=False, kv_cache=Split(host=100))
        except CapacityError:
            continue
        block = replace(search, job=replace(search.job, sequences=count))
        priced = block.add(policy)
        if not isinstance(priced, CapacityError):
            found.append(priced)
    return max(found, key=lambda each: each.prediction.tokens_per_second, default=None)
