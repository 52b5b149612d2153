"""How much of the KV pages that sequences hold has tokens in it, with real lengths."""

from __future__ import annotations

import random

from flexrun.schedulers import ContinuousScheduler
from offload.pages import PagePools
from offload.tiers import Tier
from policy_search.policy import Policy

PROMPT = """
2 181 207 372 387 396 403 414 703 984 1020 1045 1071 1097 1130 1189 1315 1876 2734 4083
"""
OUTPUT = "7 41 54 67 77 85 91 96 103 113 129 151 177 217 384 395 400 411 424 451"
"""Tokens at the quantiles 0, 5, 10, ... 95 % of conversations in the Azure LLM inference trace of
2023 (Splitwise, ISCA 2024); prompts and outputs are nearly uncorrelated."""


def drawn(table: str, draw: random.Random) -> int:
    """A length between two neighbouring quantiles."""
    values = [*map(int, table.split())]
    place = draw.uniform(0, len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return round(values[low] + (place - low) * (values[high] - values[low]))


def utilisation(page_tokens: int) -> float:
    """Tokens stored over slots of pages held, over all sweeps of a job of 300 requests."""
    draw = random.Random(0)
    policy = Policy()
    pages = {Tier.DEVICE: 50_000 // page_tokens, Tier.HOST: 100_000 // page_tokens}
    pools = PagePools(pages, page_tokens)
    scheduler = ContinuousScheduler(
        pools,
        max_rows=policy.max_rows,
        max_sequences=policy.max_sequences,
        micro_batch_rows=policy.micro_batch_rows,
        num_micro_batches=None,
    )
    left = {}
    for number in range(300):
        prompt, left[number] = drawn(PROMPT, draw), drawn(OUTPUT, draw)
        scheduler.add(number, prompt, prompt + left[number])
    stored = slots = 0
    while not (plan := scheduler.next_sweep()).empty:
        pools.take_copies()
        scheduler.commit(plan)
        stored += sum(progress.computed for progress in scheduler.running.values())
        slots += sum(len(table.pages) for table in pools.tables.values()) * page_tokens
        for span in (span for batch in plan.micro_batches for span in batch.spans):
            if span.wants_logits:
                left[span.sequence] -= 1
                if not left[span.sequence]:
                    scheduler.finish(span.sequence)
    assert set(left.values()) == {0}
    return stored / slots


def test_pages_are_nearly_full():
    assert utilisation(Policy().page_tokens) >= 0.96
    assert utilisation(256) < 0.96, "the measure says something"
