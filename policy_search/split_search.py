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
    devices: int
    """GPUs of all of them."""

    @property
    def machines(self) -> int:
        """All of them."""
        return self.prompt_machines + self.token_machines

    @property
    def rate(self) -> float:
        """Of the slower phase: no more can go through both."""
        return min(self.prompt_rate, self.token_rate)

    @property
    def rate_per_device(self) -> float:
        """The same for each GPU."""
        return self.rate / self.devices


@dataclass(frozen=True, slots=True)
class SplitSearch:
    """DistServe's placement search (OSDI 2024, algorithm 1), with pools of machines.

    Each phase is rated alone, with its own target, and only the split whose slower phase is the
    fastest for each of its GPUs is simulated as a whole. DistServe rates one machine and
    multiplies. For prompts every number of machines is rated here: a queue before several of them
    is shorter than one before each. Requests are in proportion to GPUs, so that all runs last
    about as long: at the end of a short one much is under way that nothing had to wait for.
    """

    scenario: Scenario
    """With a split, of whose numbers of machines others are tried."""
    lengths: Sequence[Lengths]
    """Of the requests for the most GPUs that there are; fewer of them get the first ones."""
    most_machines: int
    seed: int
    targets: Targets

    def splits(self) -> list[RatedSplit]:
        """The split of 2 machines, of 3, and so on, whose slower phase is the fastest for each of
        its GPUs.
        """
        token_rate = self.token_rate(1)
        prompts = {count: self.prompt_rate(count) for count in range(1, self.most_machines)}
        return [
            max(
                (
                    RatedSplit(
                        count,
                        total - count,
                        prompts[count],
                        (total - count) * token_rate,
                        self._split(count, total - count).devices,
                    )
                    for count in range(1, total)
                ),
                key=lambda split: split.rate_per_device,
            )
            for total in range(2, self.most_machines + 1)
        ]

    def prompt_rate(self, machines: int) -> float:
        """Highest rate at which so many machines give first tokens in time."""
        kind = self.scenario.prompt_kind
        scenario = replace(self.scenario, kind=kind, split=None, machines=machines, max_tokens=None)
        lengths = [Lengths(each.prompt, 1) for each in self._lengths(scenario)]
        return scenario.highest_rate(lengths, self.seed, Targets(ttft=self.targets.ttft))

    def token_rate(self, machines: int) -> float:
        """Highest rate at which so many machines give the others in time, if prompts take none."""
        scenario = self._split(1, machines, free_prompts=True)
        targets = Targets(tpot=self.targets.tpot)
        alone = replace(self.scenario, split=None, machines=machines)
        return scenario.highest_rate(self._lengths(alone), self.seed, targets)

    def rate_apart(self, split: RatedSplit) -> float:
        """Highest rate within both targets, of both phases as a whole."""
        scenario = self._split(split.prompt_machines, split.token_machines)
        return scenario.highest_rate(self._lengths(scenario), self.seed, self.targets)

    def rate_together(self, machines: int) -> float:
        """The same of so many machines that do everything, of the kind that goes on."""
        scenario = replace(self.scenario, split=None, machines=machines)
        return scenario.highest_rate(self._lengths(scenario), self.seed, self.targets)

    def _lengths(self, scenario: Scenario) -> Sequence[Lengths]:
        others = self.most_machines - 1
        most = max(self._split(1, others).devices, self._split(others, 1).devices)
        return self.lengths[: -(-len(self.lengths) * scenario.devices // most)]

    def _split(self, prompts: int, tokens: int, *, free_prompts: bool = False) -> Scenario:
        assert self.scenario.split is not None
        split = replace(
            self.scenario.split,
            prompt_machines=prompts,
            token_machines=tokens,
        )
        return replace(self.scenario, split=split, free_prompts=free_prompts)
