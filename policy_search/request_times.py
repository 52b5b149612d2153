"""When things happened to each request of a simulation (no torch)."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from policy_search.simulated_machine import Sweep


class RequestTimes:
    """Seconds on the virtual clock by number of the request; NaN: not yet."""

    def __init__(self, requests: int) -> None:
        never = [math.nan] * requests
        self.begun = array("d", never)
        """The first row of its prompt is computed."""
        self.first = array("d", never)
        """It has its first token."""
        self.finished = array("d", never)
        self.machine = array("l", [-1] * requests)
        """Number of the machine that computed its prompt."""
        self.resumed: dict[int, tuple[float, int]] = {}
        """When another machine began to generate for it, and that machine's number."""

    def note(self, machine: int, sweep: Sweep) -> None:
        """A sweep of the machine with this number has ended."""
        end = sweep.end
        for request in sweep.begun:
            if math.isnan(self.begun[request]):
                self.begun[request] = sweep.start
        for request in sweep.first:
            if math.isnan(self.first[request]):
                self.first[request] = end
                self.machine[request] = machine
                if math.isnan(self.begun[request]):  # a prompt of one token
                    self.begun[request] = sweep.start
            else:
                self.resumed[request] = sweep.start, machine
        for request in sweep.last:
            self.finished[request] = end  # of its last machine's, if there are two
