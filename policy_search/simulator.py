"""Jobs on a virtual clock: what happens when, from the first arrival to the last token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from policy_search.agenda import Agenda, Kind
from policy_search.arrivals import at_once
from policy_search.cluster import Cluster, Pool
from policy_search.event_log import NO_LOG, EventLog
from policy_search.request_times import RequestTimes
from policy_search.simulated_machine import SimulatedMachine
from policy_search.simulation import Simulation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from policy_search.arrivals import TimedRequest
    from policy_search.simulated_machine import Scheduler
    from policy_search.sweep_load import SweepLoad, SweepTerms
    from policy_search.workload import Lengths


def run(cluster: Cluster, requests: Sequence[TimedRequest], log: EventLog = NO_LOG) -> RequestTimes:
    """Run all requests to their ends, event by event; `cluster` keeps its own account."""
    machines, times = cluster.machines, RequestTimes(len(requests))
    agenda = Agenda([request.arrival for request in requests])
    for now, kind, number in agenda:
        if kind is Kind.SWEEP_START:
            if (started := machines[number].start_sweep(now)) is None:
                machines[number].woken = False
            else:
                agenda.add(started.end, Kind.SWEEP_END, number)
            continue
        if kind is Kind.SWEEP_END:
            machine = machines[number]
            machine.woken = False
            sweep = machine.end_sweep()
            times.note(machine.number, sweep)
            log.sweep(machine, sweep)
            for leaving in cluster.leaving(machine, sweep, requests):
                transfer = cluster.send(now, leaving, requests[leaving])
                agenda.add(transfer.end, Kind.DELIVERY, leaving)
                log.transfer(transfer)
        elif kind is Kind.ARRIVAL:
            machine = cluster.receive(number, requests[number])
        else:
            machine = cluster.resume(number, requests[number])
        if not machine.woken:
            machine.woken = True
            agenda.add(now, Kind.SWEEP_START, machine.number)
    stopped = "the scheduler has stopped before all requests were over"
    assert all(machine.idle for machine in machines), stopped
    return times


def simulate(
    scheduler: Scheduler,
    lengths: Sequence[Lengths],
    cost: Callable[[SweepLoad], SweepTerms],
    *,
    max_tokens: int | None = None,
) -> Simulation:
    """Run a job of `lengths` on one machine, on which a sweep takes what `cost` says.

    The scheduler is told no request's output length, but `max_tokens` for all of them; None tells
    it each one's own. Requests that can never fit into the KV cache have to be left out before.
    """
    cluster = Cluster(Pool([SimulatedMachine(0, scheduler, cost)]), max_tokens=max_tokens)
    requests = at_once(lengths)
    return Simulation.of(cluster, requests, run(cluster, requests))
