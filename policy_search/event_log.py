"""Who listens to a simulation (no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from policy_search.network import Transfer
    from policy_search.simulated_machine import SimulatedMachine, Sweep


class EventLog:
    """Is told what was simulated; this one forgets it."""

    def sweep(self, machine: SimulatedMachine, sweep: Sweep) -> None:
        """One has ended."""

    def transfer(self, transfer: Transfer) -> None:
        """One has been queued."""


NO_LOG = EventLog()
