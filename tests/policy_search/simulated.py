"""Clusters for tests of simulations, with the engine's scheduler."""

from __future__ import annotations

from collections.abc import Callable

from flexrun.schedulers import SCHEDULERS
from offload.pages import PagePools
from offload.tiers import Tier
from policy_search.event_log import EventLog
from policy_search.network import Transfer
from policy_search.scenario import MachineKind, Scenario, Split
from policy_search.simulated_machine import Scheduler, SimulatedMachine, Sweep
from policy_search.sweep_load import SweepLoad, SweepTerms


def constant(seconds: float) -> Callable[[SweepLoad], SweepTerms]:
    """Every sweep takes as long."""
    return lambda load: SweepTerms(seconds, {"compute": seconds})


def scheduler_of(kind: str = "continuous", pages: int = 1000, **settings) -> Scheduler:
    """One with pages of 4 tokens."""
    settings = {"max_rows": 64, "max_sequences": 4, "micro_batch_rows": 64} | settings
    return SCHEDULERS[kind](PagePools({Tier.DEVICE: pages}, 4), **settings)


def scenario(
    cost: Callable[[SweepLoad], SweepTerms], split: Split | None = None, **settings
) -> Scenario:
    """Machines with room for everything, whose sweeps take whole prompts."""
    cluster = {name: settings.pop(name) for name in ("machines", "routing") if name in settings}
    big = {"max_rows": 20_000, "micro_batch_rows": 20_000, "max_sequences": 64, "pages": 100_000}
    settings = big | settings
    kind = MachineKind(make_scheduler=lambda: scheduler_of(**settings), cost=cost)
    return Scenario(kind=kind, split=split, **cluster)


class Recorder(EventLog):
    """Keeps everything."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Sweep | Transfer]] = []

    def sweep(self, machine: SimulatedMachine, sweep: Sweep) -> None:
        self.events.append((machine.name, sweep))

    def transfer(self, transfer: Transfer) -> None:
        self.events.append(("network", transfer))
