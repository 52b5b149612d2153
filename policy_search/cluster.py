"""Machines that share a job, and which of them a request goes to (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from policy_search.arrivals import TimedRequest
    from policy_search.network import Network, Transfer
    from policy_search.simulated_machine import SimulatedMachine, Sweep

ROUTINGS = ("jsq", "rr")
"""To the machine with the fewest pending tokens (join the shortest queue, as Splitwise's scheduler
does), or to one after the other."""


@dataclass(slots=True)
class Pool:
    """Machines of which any may take a request."""

    machines: Sequence[SimulatedMachine]
    routing: str = ROUTINGS[0]
    _turn: int = 0

    def choose(self) -> SimulatedMachine:
        """Where the next request goes."""
        if self.routing == "jsq":
            return min(self.machines, key=lambda machine: machine.pending_tokens)
        machine = self.machines[self._turn % len(self.machines)]
        self._turn += 1
        return machine


@dataclass(slots=True)
class Cluster:
    """Machines that do everything, or some for prompts and others for the tokens that follow.

    In the second case a prompt and its first token are computed in one place, and keys and values
    cross the network to the other (DistServe, Splitwise). The pages that they leave are free at
    once, as if the network had room for them.
    """

    pool: Pool
    """Machines that requests arrive at."""
    token_pool: Pool | None = None
    """Those that go on after the first token; None: whoever computed the prompt does."""
    network: Network | None = None
    """Between the two."""
    max_tokens: int | None = None
    """What schedulers know of every request's output; None: its own length."""
    machines: list[SimulatedMachine] = field(init=False)

    def __post_init__(self) -> None:
        assert (self.token_pool is None) == (self.network is None)
        others = self.token_pool.machines if self.token_pool else ()
        self.machines = [*self.pool.machines, *others]
        assert [machine.number for machine in self.machines] == list(range(len(self.machines)))

    def receive(self, number: int, request: TimedRequest) -> SimulatedMachine:
        """Give a request that has arrived to a machine, which is returned."""
        machine = self.pool.choose()
        machine.pending_tokens += request.prompt
        most = request.prompt + (self.max_tokens or request.output)
        output = request.output
        if self.token_pool is not None:
            most, output = request.prompt + 1, 1
        machine.add(number, request.prompt, most, output)
        return machine

    def resume(self, number: int, request: TimedRequest) -> SimulatedMachine:
        """Give a request whose prompt was computed to a machine, which is returned."""
        assert self.token_pool is not None
        machine = self.token_pool.choose()
        machine.pending_tokens += 1
        prompt = request.prompt
        most = prompt + (self.max_tokens or request.output)
        machine.add(number, prompt + 1, most, request.output - 1, computed=prompt)
        return machine

    def leaving(
        self, machine: SimulatedMachine, sweep: Sweep, requests: Sequence[TimedRequest]
    ) -> list[int]:
        """Requests that go on elsewhere after a sweep in which they got their first token.

        A machine's pending tokens are those of its prompts, and one of everyone that generates.
        """
        machine.pending_tokens -= len(sweep.last)
        if machine.number >= len(self.pool.machines):
            return []
        machine.pending_tokens -= sum([requests[number].prompt - 1 for number in sweep.first])
        if self.token_pool is None:
            return []
        return [number for number in sweep.first if requests[number].output > 1]

    def send(self, now: float, number: int, request: TimedRequest) -> Transfer:
        """Queue the keys and values of one that is `leaving`."""
        assert self.network is not None
        return self.network.send(now, number, request.prompt)
