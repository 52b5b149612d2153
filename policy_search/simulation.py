"""What came of a simulation, in numbers (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from policy_search.latency import Latencies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from policy_search.arrivals import TimedRequest
    from policy_search.cluster import Cluster
    from policy_search.latency import Targets
    from policy_search.request_times import RequestTimes
    from policy_search.simulated_machine import SimulatedMachine


@dataclass(frozen=True, slots=True)
class MachineUse:
    """What one machine did."""

    name: str
    sweeps: int
    rows: int
    in_sweeps: float
    """Share of the makespan."""
    busy: dict[str, float]
    """The same of every resource."""
    preemptions: int


@dataclass(frozen=True, slots=True)
class NetworkUse:
    """What crossed the link between machines."""

    nbytes: int
    transfers: int
    busy: float
    """Share of the makespan."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """What happened."""

    requests: int
    sweeps: int
    rows: int
    prompt_tokens: int
    generated_tokens: int
    makespan_seconds: float
    """From the first arrival to the last token."""
    tokens_per_second: float
    """Generated ones."""
    slot_utilization: float
    """Sequences that run, over those that may; mean of all sweeps."""
    kv_utilization: float
    """Tokens stored over slots of pages held, over all sweeps."""
    preemptions: int
    latency: dict[str, dict[str, float]]
    """`Latencies.percentiles`, in seconds."""
    attainment: float | None
    """Share of the requests that meet the targets, …"""
    goodput: float | None
    """… and how many of them there were per second; None where there are no targets."""
    machines: list[MachineUse]
    network: NetworkUse | None

    @classmethod
    def of(
        cls,
        cluster: Cluster,
        requests: Sequence[TimedRequest],
        times: RequestTimes,
        targets: Targets | None = None,
    ) -> Simulation:
        """Of what has run to its end."""
        machines = cluster.machines
        start = min((request.arrival for request in requests), default=0.0)
        seconds = max(times.finished, default=start) - start
        generated = sum(request.output for request in requests)
        sweeps = sum(machine.sweeps for machine in machines)
        places = sum(machine.sweeps * machine.scheduler.max_sequences for machine in machines)
        slots = sum(machine.slots for machine in machines)
        latencies = Latencies.of(requests, times)
        attainment = None if targets is None else targets.met_by(latencies)
        served = (attainment or 0.0) * len(requests)
        network = cluster.network
        return cls(
            requests=len(requests),
            sweeps=sweeps,
            rows=sum(machine.rows for machine in machines),
            prompt_tokens=sum(request.prompt for request in requests),
            generated_tokens=generated,
            makespan_seconds=seconds,
            tokens_per_second=generated / seconds if seconds else 0.0,
            slot_utilization=sum(each.places for each in machines) / places if sweeps else 0.0,
            kv_utilization=sum(each.stored for each in machines) / slots if slots else 0.0,
            preemptions=sum(machine.scheduler.preemption.count for machine in machines),
            latency=latencies.percentiles(),
            attainment=attainment,
            goodput=None if attainment is None else served / seconds if seconds else 0.0,
            machines=[_use(machine, seconds) for machine in machines],
            network=None
            if network is None
            else NetworkUse(
                network.nbytes, len(network.transfers), _share(network.seconds, seconds)
            ),
        )


def _use(machine: SimulatedMachine, makespan: float) -> MachineUse:
    return MachineUse(
        name=machine.name,
        sweeps=machine.sweeps,
        rows=machine.rows,
        in_sweeps=_share(machine.seconds, makespan),
        busy={name: _share(seconds, makespan) for name, seconds in machine.busy.items()},
        preemptions=machine.scheduler.preemption.count,
    )


def _share(seconds: float, makespan: float) -> float:
    return seconds / makespan if makespan else 0.0
