"""Facts about the search for how many machines compute prompts, and how many go on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policy_search.capacity import SHARE
from policy_search.latency import Targets
from policy_search.profiles import PROFILES
from policy_search.scenario import Scenario, Split
from policy_search.split_search import SplitSearch
from policy_search.sweep_load import SweepLoad, SweepTerms
from policy_search.workload import Lengths, Workload
from tests.policy_search.simulated import scenario

OPT = PROFILES["opt-13b-a100"]
ONE_TO_ONE = Split(
    prompt_machines=1, token_machines=1, network=25e9, token_bytes=OPT.kv_token_bytes
)
OPT_CONTEXT = 2048
"""Tokens (its config.json): DistServe leaves out what is longer."""
KV_TOKENS = 50_000
"""Of a machine, as in DistServe's simulator."""


def search_of(where: Scenario, lengths: list[Lengths], machines: int, targets: Targets):
    return SplitSearch(where, lengths, machines, 0, targets)


@pytest.mark.parametrize(("prompt_ms", "expected"), [(5, (1, 3)), (30, (2, 2)), (300, (3, 1))])
def test_the_slower_phase_gets_more_machines(prompt_ms, expected):
    """A prompt takes what is given, and a token machine four sequences of 11 tokens at a time, with
    10 ms for each sweep: 40 requests a second.
    """

    def cost(load: SweepLoad) -> SweepTerms:
        prompts = (load.rows - load.generating) / 64
        return SweepTerms((prompts * prompt_ms + 10 * bool(load.generating)) / 1000, {})

    where = scenario(cost, ONE_TO_ONE, max_sequences=4)
    found = search_of(where, [Lengths(64, 11)] * 400, 4, Targets(5 * prompt_ms / 1000, 0.05))
    best = found.splits()[-1]
    assert (best.prompt_machines, best.token_machines) == expected


def test_the_whole_is_no_faster_than_its_slower_phase():
    """A request that keeps both targets keeps each of them; and phases are rated as they run."""
    lengths = Workload(workload="conv", requests=60, scale=0.2).lengths()
    search = search_of(scenario(OPT.cost, ONE_TO_ONE), lengths, 2, Targets(0.15, 0.03))
    (split,) = search.splits()
    assert 0 < search.rate_apart(split) <= 1.02 * split.rate


def test_prompts_elsewhere_serve_more_than_a_machine_that_does_both():
    """DistServe's comparison: OPT-13B, 250 and 100 ms, conversations that its context holds, for
    each machine of the best split and for one machine that does everything: with vLLM of then,
    prompts first, and with the scheduler that jobs run with. (With prompts first at DistServe's own
    speed, or with as many machines behind one queue, the split serves less: DESIGN.md.)
    """
    drawn = Workload(workload="conv", requests=1200).lengths()
    lengths = [each for each in drawn if sum(each) <= OPT_CONTEXT]
    where = scenario(OPT.cost, ONE_TO_ONE, max_sequences=256, pages=KV_TOKENS // 4)
    targets = Targets(0.25, 0.1)
    search = search_of(where, lengths, 5, targets)
    best = max(search.splits(), key=lambda split: split.rate_per_device)
    sizes = {"prompt_machines": best.prompt_machines, "token_machines": best.token_machines}
    apart = replace(where, split=replace(ONE_TO_ONE, **sizes))
    vllm = scenario(
        PROFILES["opt-13b-a100-vllm"].cost, kind="phased", max_sequences=256, pages=KV_TOKENS // 4
    )
    of_vllm = vllm.highest_rate(lengths[:240], 0, targets)
    alone = search.rate_together(1)
    assert 0 < of_vllm < alone
    rate = best.machines * alone
    served = lengths[: len(lengths) * best.machines // 5]
    assert apart.attainment(served, rate, 0, targets) >= SHARE
