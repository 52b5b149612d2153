"""Facts about waiting, against queueing theory."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest

from offload.pages import PagePools
from policy_search.arrivals import poisson
from policy_search.cluster import Cluster, Pool
from policy_search.latency import Latencies
from policy_search.simulated_machine import SimulatedMachine
from policy_search.simulator import run
from policy_search.workload import Lengths
from tests.policy_search.simulated import constant, scenario

SERVICE = 0.1
ONE_AT_A_TIME = scenario(constant(SERVICE), max_sequences=1, pages=4)


class FirstInFirstOut:
    """As little of a scheduler as there can be: one request of 4 tokens in a sweep, and no more.

    A hundred thousand requests take the engine's own too long for a test.
    """

    def __init__(self) -> None:
        self.pools = PagePools({}, 4)
        self.running: list[int] = []
        self.max_sequences = 1
        self.preemption = SimpleNamespace(count=0)
        self.waiting = deque[int]()

    def add(
        self,
        sequence: int,
        prompt_tokens: int,
        most_tokens: int,
        group: int | None = None,
        computed: int = 0,
    ) -> None:
        self.waiting.append(sequence)

    def next_sweep(self) -> SimpleNamespace:
        spans = [(self.waiting.popleft(), 0, 4, True, 0)] if self.waiting else []
        return SimpleNamespace(spans=spans)

    def commit(self, plan: object) -> None: ...

    def finish(self, sequence: int) -> None: ...


@pytest.mark.parametrize(("load", "expected"), [(0.5, 0.150), (0.8, 0.300)])
def test_one_at_a_time_is_the_queue_that_theory_knows(load, expected):
    """M/D/1: D + R D^2 / (2 (1 - R D)) until the first token, on average (DistServe, section 3.1).

    At a load of 0.8 one seed in three is within two percent of it, after 50 000 requests.
    """
    requests = poisson([Lengths(4, 1)] * 50_000, load / SERVICE, seed=1)
    cluster = Cluster(Pool([SimulatedMachine(0, FirstInFirstOut(), constant(SERVICE))]))
    ttft = Latencies.of(requests, run(cluster, requests)).ttft
    assert ttft.mean() == pytest.approx(expected, rel=0.02)


def test_everyone_waits_for_those_before():
    """Lindley's recursion, request by request: the wait and service of the last one, less the gap
    to it.
    """
    requests = poisson([Lengths(4, 1)] * 1000, 0.8 / SERVICE, seed=0)
    latencies = Latencies.of(requests, run(ONE_AT_A_TIME.cluster(), requests))
    wait, waits = 0.0, []
    for before, request in zip([requests[0], *requests], requests):
        gap = request.arrival - before.arrival
        wait = max(0.0, wait + SERVICE - gap) if request is not requests[0] else 0.0
        waits.append(wait)
    assert max(waits) > SERVICE
    assert latencies.queue == pytest.approx(waits, abs=1e-9)
    assert latencies.ttft == pytest.approx(latencies.queue + SERVICE, abs=1e-9)


def test_another_rate_stretches_the_same_arrivals():
    slow, fast = (poisson([Lengths(4, 1)] * 100, rate, seed=3) for rate in (1.0, 4.0))
    assert [each.arrival for each in slow] == [4 * each.arrival for each in fast]
    # A hundred gaps of a second each have a mean with a standard deviation of a tenth.
    assert slow[-1].arrival == pytest.approx(100, rel=0.3)
