"""Machines to simulate, each with a scheduler and pages of its own (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from policy_search.arrivals import poisson
from policy_search.capacity import highest_rate
from policy_search.cluster import ROUTINGS, Cluster, Pool
from policy_search.latency import Latencies
from policy_search.network import Network
from policy_search.simulated_machine import SimulatedMachine
from policy_search.simulator import run
from policy_search.sweep_load import SweepTerms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from policy_search.latency import Targets
    from policy_search.simulated_machine import Scheduler
    from policy_search.sweep_load import SweepLoad
    from policy_search.workload import Lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineKind:
    """What machines of a kind have, each for itself."""

    make_scheduler: Callable[[], Scheduler]
    cost: Callable[[SweepLoad], SweepTerms]
    devices: int = 1
    """GPUs of one machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Prompts are computed by some machines and continued by others."""

    prompt_machines: int
    token_machines: int
    network: float
    """Bytes per second of the link between them."""
    token_bytes: int
    """Of one token's keys and values."""
    prompt_kind: MachineKind | None = None
    """Of the machines for prompts, if they are of another kind than those that go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A cluster that can be built again for every run."""

    kind: MachineKind
    """Of every machine, but for those that a `split` has for prompts."""
    machines: int = 1
    """That do everything; with a `split`, those that it has instead."""
    split: Split | None = None
    free_prompts: bool = False
    """With a `split` prompts take no time: what is left is what its token machines do."""
    routing: str = ROUTINGS[0]
    max_tokens: int | None = None
    """See `Cluster`."""

    @property
    def prompt_kind(self) -> MachineKind:
        """Of the machines that compute prompts."""
        return (self.split and self.split.prompt_kind) or self.kind

    @property
    def devices(self) -> int:
        """GPUs of all machines."""
        if self.split is None:
            return self.machines * self.kind.devices
        prompts = self.split.prompt_machines * self.prompt_kind.devices
        return prompts + self.split.token_machines * self.kind.devices

    def cluster(self) -> Cluster:
        """Machines with nothing to do yet."""
        split = self.split
        if split is None:
            pool = self._pool("machine", range(self.machines), self.kind)
            return Cluster(pool, max_tokens=self.max_tokens)
        prompts = split.prompt_machines
        return Cluster(
            self._pool("prompt machine", range(prompts), self._free(self.prompt_kind)),
            self._pool("token machine", range(prompts, prompts + split.token_machines), self.kind),
            Network(split.network, split.token_bytes),
            self.max_tokens,
        )

    def _free(self, kind: MachineKind) -> MachineKind:
        return replace(kind, cost=_nothing) if self.free_prompts else kind

    def _pool(self, name: str, numbers: range, kind: MachineKind) -> Pool:
        machines = [
            SimulatedMachine(number, kind.make_scheduler(), kind.cost, f"{name} {number}")
            for number in numbers
        ]
        return Pool(machines, self.routing)

    def attainment(
        self, lengths: Sequence[Lengths], rate: float, seed: int, targets: Targets
    ) -> float:
        """Share of the requests that meet the targets if they arrive at `rate`, at random."""
        requests = poisson(lengths, rate, seed)
        return targets.met_by(Latencies.of(requests, run(self.cluster(), requests)))

    def highest_rate(self, lengths: Sequence[Lengths], seed: int, targets: Targets) -> float:
        """Requests per second that all machines together serve within the targets, most of the
        time: see `capacity`.
        """
        return highest_rate(lambda rate: self.attainment(lengths, rate, seed, targets))


def _nothing(load: SweepLoad) -> SweepTerms:
    return SweepTerms(0.0, {})
