"""How many machines should compute prompts, and how many should go on after that (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from policy_search.latency import Targets
from policy_search.workload import Lengths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from policy_search.scenario import Scenario


@dataclass(frozen=True, slots=True)
class RatedSplit:
    """The best split of a number of machines; rates are requests per second."""

    prompt_machines: int
    token_machines: int
    prompt_rate: float
    """That the prompt machines alone keep within the target for the first token, …"""
    token_rate: float
    """… and the token machines alone within the one for the others."""

    @property
    def machines(self) -> int:
        """All of them."""
        return self.prompt_machines + self.token_machines

    @property
    def rate(self) -> float:
        """Of the slower phase: no more can go through both."""
        return min(self.prompt_rate, self.token_rate)


@dataclass(frozen=True, slots=True)
class SplitSearch:
    """DistServe's placement search (OSDI 2024, algorithm 1), with pools of machines.

    Each phase is rated alone, with its own target, and only the split whose slower phase is the
    fastest for each of its machines is simulated as a whole. DistServe rates one machine and
    multiplies. For prompts every number of machines is rated here: a queue before several of them
    is shorter than one before each. Requests are in proportion to machines, so that all runs last
    about as long: at the end of a short one much is under way that nothing had to wait for.
    """

    scenario: Scenario
    """With a split, of whose numbers of machines others are tried."""
    lengths: Sequence[Lengths]
    """Of the requests for `most_machines`; fewer machines get the first ones."""
    most_machines: int
    seed: int
    targets: Targets

    def splits(self) -> list[RatedSplit]:
        """The split of 2 machines, of 3, and so on, whose slower phase is the fastest."""
        token_rate = self.token_rate(1)
        prompts = {count: self.prompt_rate(count) for count in range(1, self.most_machines)}
        return [
            max(
                (
                    RatedSplit(count, total - count, prompts[count], (total - count) * token_rate)
                    for count in range(1, total)
                ),
                key=lambda split: split.rate,
            )
            for total in range(2, self.most_machines + 1)
        ]

    def prompt_rate(self, machines: int) -> float:
        """Highest rate at which so many machines give first tokens in time."""
        lengths = [Lengths(each.prompt, 1) for each in self._lengths(machines)]
        scenario = replace(self.scenario, split=None, machines=machines)
        return scenario.highest_rate(lengths, self.seed, Targets(ttft=self.targets.ttft))

    def token_rate(self, machines: int) -> float:
        """Highest rate at which so many machines give the others in time, if prompts take none."""
        scenario = self._split(1, machines, free_prompts=True)
        targets = Targets(tpot=self.targets.tpot)
        return scenario.highest_rate(self._lengths(machines), self.seed, targets)

    def rate_apart(self, split: RatedSplit) -> float:
        """Highest rate within both targets, of both phases as a whole."""
        scenario = self._split(split.prompt_machines, split.token_machines)
        return scenario.highest_rate(self._lengths(split.machines), self.seed, self.targets)

    def rate_together(self, machines: int) -> float:
        """The same of so many machines that do everything."""
        scenario = replace(self.scenario, split=None, machines=machines)
        return scenario.highest_rate(self._lengths(machines), self.seed, self.targets)

    def _lengths(self, machines: int) -> Sequence[Lengths]:
        return self.lengths[: -(-len(self.lengths) * machines // self.most_machines)]

    def _split(self, prompts: int, tokens: int, *, free_prompts: bool = False) -> Scenario:
        assert self.scenario.split is not None
        split = replace(
            self.scenario.split,
            prompt_machines=prompts,
            token_machines=tokens,
        )
        return replace(self.scenario, split=split, free_prompts=free_prompts)
