"""Facts about several machines on a virtual clock."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from flexrun.schedulers import SCHEDULERS
from policy_search.arrivals import TimedRequest, at_once, poisson
from policy_search.capacity import SHARE, highest_rate
from policy_search.cluster import ROUTINGS, Pool
from policy_search.latency import Latencies, Targets
from policy_search.network import Network, Transfer
from policy_search.profiles import PROFILES
from policy_search.scenario import Split
from policy_search.simulated_machine import SimulatedMachine
from policy_search.simulation import Simulation
from policy_search.simulator import run
from policy_search.sweep_load import SweepTerms
from policy_search.workload import Lengths, Workload
from tests.policy_search.simulated import Recorder, constant, scenario, scheduler_of

H100 = PROFILES["llama2-70b-h100"]
ONE_TO_ONE = Split(
    prompt_machines=1, token_machines=1, network=25e9, token_bytes=H100.kv_token_bytes
)
CONVERSATIONS = Workload(workload="conv", requests=150).lengths()
AT_TWO_A_SECOND = poisson(CONVERSATIONS, 2.0, seed=0)


def simulated(split: Split | None, **settings):
    cluster, log = scenario(H100.cost, split, **settings).cluster(), Recorder()
    times = run(cluster, AT_TWO_A_SECOND, log)
    return Simulation.of(cluster, AT_TWO_A_SECOND, times), log, times


@pytest.mark.parametrize("split", [None, ONE_TO_ONE])
def test_every_token_is_computed_once(split):
    """A request of p and n tokens takes p + n - 1 rows, wherever they are computed."""
    result, log, times = simulated(split)
    assert result.rows == sum(p + n - 1 for p, n in CONVERSATIONS)
    first = Counter(number for _, each in log.events for number in getattr(each, "first", ()))
    machines = {
        n: 1 if split is None or out == 1 else 2 for n, (_, out) in enumerate(CONVERSATIONS)
    }
    assert first == machines
    assert not any(map(math.isnan, times.finished))
    assert times.begun <= times.first <= times.finished


def test_what_crosses_the_network_is_the_prompts_keys_and_values():
    result, log, times = simulated(ONE_TO_ONE)
    moved = [each for _, each in log.events if isinstance(each, Transfer)]
    assert [each.nbytes for each in sorted(moved, key=lambda each: each.request)] == [
        prompt * H100.kv_token_bytes for prompt, output in CONVERSATIONS if output > 1
    ]
    network = result.network
    assert network is not None
    assert 0 < network.busy <= 1
    assert network.nbytes == sum(each.nbytes for each in moved)
    assert all(times.resumed[each.request][0] >= each.end for each in moved)


def test_the_same_seed_gives_the_same_events():
    one, other = (simulated(ONE_TO_ONE)[1].events for _ in range(2))
    assert one == other
    changed = Recorder()
    run(scenario(H100.cost, ONE_TO_ONE).cluster(), poisson(CONVERSATIONS, 2.0, seed=1), changed)
    assert changed.events != one


def test_transfers_wait_for_each_other():
    """The link is one: what is asked for while it is busy leaves when it is free."""
    network = Network(speed=10.0, token_bytes=2)
    assert network.send(1.0, 0, tokens=5) == Transfer(0, 1.0, 1.0, 2.0, 10)
    assert network.send(1.5, 1, tokens=10) == Transfer(1, 1.5, 2.0, 4.0, 20)
    assert network.send(9.0, 2, tokens=5).start == 9.0
    assert network.seconds == 4.0


def test_generating_waits_for_keys_and_values():
    """By hand: a prompt of 1 s, 8 positions over a link of 2 a second, then two tokens of 1 s."""
    split = Split(prompt_machines=1, token_machines=1, network=2.0, token_bytes=1)
    requests = [TimedRequest(0.0, 8, 3), TimedRequest(0.0, 8, 1)]
    cluster = scenario(constant(1.0), split).cluster()
    times = run(cluster, requests)
    assert (list(times.first), list(times.finished)) == ([1.0, 1.0], [7.0, 1.0])
    assert times.resumed == {0: (5.0, 1)}
    assert cluster.network is not None
    assert list(cluster.network.transfers) == [0], "who has only one token stays"


def test_requests_arrive_when_they_do():
    """A machine that is idle starts at once, and one in a sweep ends it first."""
    requests = [TimedRequest(0.5, 4, 2), TimedRequest(1.0, 4, 1), TimedRequest(9.0, 4, 1)]
    times = run(scenario(constant(1.0)).cluster(), requests)
    assert list(times.begun) == [0.5, 1.5, 9.0]
    assert list(times.finished) == [2.5, 2.5, 10.0]


def test_routing():
    """One after the other, or to whoever has the fewest tokens to compute."""
    lengths = [Lengths(100, 2), Lengths(10, 2), Lengths(10, 2), Lengths(10, 2)]
    used = {}
    for routing in ("rr", "jsq"):
        cluster = scenario(constant(1.0), machines=2, routing=routing).cluster()
        used[routing] = list(run(cluster, at_once(lengths)).machine)
        assert [machine.pending_tokens for machine in cluster.machines] == [0, 0]
    assert used == {"rr": [0, 1, 0, 1], "jsq": [0, 1, 1, 1]}


def test_pending_tokens_count_those_that_generate():
    """Of two machines with nothing to compute but next tokens, the one with fewer is chosen."""
    machines = [SimulatedMachine(n, scheduler_of(), constant(1.0)) for n in range(2)]
    machines[0].pending_tokens, machines[1].pending_tokens = 2, 1
    assert Pool(machines).choose() is machines[1]


@pytest.mark.parametrize("seed", range(60))
def test_any_cluster_serves_everyone(seed):
    """Whatever the schedulers, splits, pages and arrivals: rows are computed once unless their
    pages were given away, all requests go through their stages in order, and nothing is kept.
    """
    draw = random.Random(seed)
    lengths = [Lengths(draw.randint(1, 40), draw.randint(1, 30)) for _ in range(20)]
    prompts, tokens = draw.randint(1, 3), draw.randint(1, 3)
    split = Split(
        prompt_machines=prompts,
        token_machines=tokens,
        network=10 ** draw.uniform(0, 4),
        token_bytes=1,
        prompt_kind=scenario(constant(0.2)).kind if seed % 2 else None,
    )
    rows = draw.choice([9, 64])
    cluster = scenario(
        lambda load: SweepTerms(0.01 * load.rows + 0.05, {}),
        draw.choice([None, split]),
        kind=draw.choice(list(SCHEDULERS)),
        machines=draw.randint(1, 3),
        routing=draw.choice(ROUTINGS),
        pages=draw.choice([18, 40, 500]),
        max_sequences=draw.choice([1, 3, 8]),
        max_rows=rows,
        micro_batch_rows=rows,
    ).cluster()
    requests = draw.choice([at_once(lengths), poisson(lengths, 10 ** draw.uniform(-2, 2), seed)])
    times = run(cluster, requests)
    result = Simulation.of(cluster, requests, times)
    needed = sum(prompt + output - 1 for prompt, output in lengths)
    assert result.rows == needed if not result.preemptions else result.rows > needed
    stages = zip((each.arrival for each in requests), times.begun, times.first, times.finished)
    assert all(list(each) == sorted(each) for each in stages)
    assert not any(map(math.isnan, times.finished))
    for machine in cluster.machines:
        assert machine.pending_tokens == 0
        assert not machine.scheduler.pools.tables


def test_more_machines_take_less_time():
    lengths = [Lengths(8, 8)] * 64
    seconds = []
    for machines in (1, 2, 4):
        cluster = scenario(constant(1.0), machines=machines, max_sequences=4).cluster()
        result = Simulation.of(cluster, at_once(lengths), run(cluster, at_once(lengths)))
        seconds.append(result.makespan_seconds)
        assert len(result.machines) == machines
        assert all(use.in_sweeps == pytest.approx(1.0) for use in result.machines)
    # 16 groups of 4 take 8 sweeps each, one after the other.
    assert seconds == [128.0, 64.0, 32.0]


def test_a_small_token_machine_computes_again_what_it_gave_away():
    """All requests end, though keys and values that arrived were lost for want of pages."""
    split = Split(prompt_machines=1, token_machines=1, network=1e9, token_bytes=1)
    cluster = scenario(constant(1.0), split, pages=14).cluster()
    requests = at_once([Lengths(5, 20)] * 8)
    result = Simulation.of(cluster, requests, run(cluster, requests))
    assert result.preemptions > 0
    assert result.rows > sum(each.prompt + each.output - 1 for each in requests)


def test_targets():
    """A request has to meet both; with one token there is no time between tokens."""
    cluster = scenario(constant(1.0), max_sequences=1).cluster()
    requests = at_once([Lengths(4, 3), Lengths(4, 1)])
    latencies = Latencies.of(requests, run(cluster, requests))
    met = [Targets(ttft, tpot).met_by(latencies) for ttft in (0.5, 1.0, 4.0) for tpot in (0.5, 1.0)]
    assert met == [0.0, 0.0, 0.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("limit", [0.01, 0.3, 7.0, 900.0])
def test_bisection_finds_the_limit(limit):
    """To one part in a hundred, from below; nothing if even the lowest rate is too much."""
    found = highest_rate(lambda rate: 1.0 if rate <= limit else SHARE - 0.01)
    assert found == 0.0 if limit < 1 / 64 else 0.99 * limit <= found <= limit


def test_looser_targets_never_lower_the_rate():
    lengths = Workload(workload="conv", requests=30, scale=0.1).lengths()
    machine = scenario(PROFILES["opt-13b-a100"].cost)
    rates = [machine.highest_rate(lengths, 0, Targets(ttft, 0.1)) for ttft in (0.03, 0.04, 0.1)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_prompts_elsewhere_keep_more_requests_within_their_targets():
    """Two machines for prompts and one for tokens serve more of half as long conversations in 250
    and 100 ms than three that do both: there prompts wait for a sweep to end, and ride beside
    others that generate.
    """
    lengths = Workload(workload="conv", requests=300, scale=0.5).lengths()
    cost, targets = PROFILES["opt-13b-a100"].cost, Targets(0.25, 0.1)
    split = Split(
        prompt_machines=2,
        token_machines=1,
        network=25e9,
        token_bytes=PROFILES["opt-13b-a100"].kv_token_bytes,
    )
    apart, together = (
        scenario(cost, **how).attainment(lengths, 6.0, 0, targets)
        for how in ({"split": split}, {"machines": 3})
    )
    assert apart > together > 0.8
