"""What a plan is for: throughput, within the time that there is (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from policy_search.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from policy_search.job_pricing import Candidate

ALIKE = 0.01
"""Plans whose rates differ by less are as fast: the one whose requests end sooner is better."""

WORTH_OFFLOADING = 0.15
"""Of the throughput: what is offloaded for less has overheads that no plan knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """The most tokens per second, under limits. Raises `PolicyError` where they are none."""

    max_latency: float | None = None
    """Seconds that a request may take from the job's start, or from when it begins."""
    deadline: float | None = None
    """Seconds for the whole job."""

    def __post_init__(self) -> None:
        for flag, value in (("--max-latency", self.max_latency), ("--deadline", self.deadline)):
            if value is not None and not value > 0:
                raise PolicyError(f"{flag} must be above 0, not {value:g}", hint="it is in seconds")

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """Of at least one. Raises `PolicyError` if none meets the limits."""
        return self._quickest(self.eligible(candidates))

    def eligible(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Of which the fastest is the best. Raises `PolicyError` if none meets the limits.

        What offloads nothing is taken unless another plan is faster by `WORTH_OFFLOADING`, and else
        what keeps pages and hidden states on the device.
        """
        meeting = [each for each in candidates if self.met_by(each)]
        if not meeting:
            raise self._missed(candidates)
        most = max(each.prediction.tokens_per_second for each in meeting)
        least = (1 - WORTH_OFFLOADING) * most
        enough = [each for each in meeting if each.prediction.tokens_per_second >= least]
        weights_alone = [each for each in enough if each.policy.pages_on_device]
        nothing = [each for each in weights_alone if each.policy.all_on_device]
        return nothing or weights_alone or meeting

    def _quickest(self, meeting: Sequence[Candidate]) -> Candidate:
        """Of those that are about as fast as the fastest."""
        most = max(each.prediction.tokens_per_second for each in meeting)
        alike = [
            each for each in meeting if each.prediction.tokens_per_second >= (1 - ALIKE) * most
        ]
        return min(alike, key=lambda each: each.prediction.request_seconds)

    def met_by(self, candidate: Candidate) -> bool:
        """Whether `candidate` keeps to the limits."""
        found = candidate.prediction
        in_time = self.deadline is None or found.job_seconds <= self.deadline
        return in_time and (self.max_latency is None or found.request_seconds <= self.max_latency)

    def _missed(self, candidates: Sequence[Candidate]) -> PolicyError:
        shortest = min(each.prediction.request_seconds for each in candidates)
        fastest = min(each.prediction.job_seconds for each in candidates)
        if self.max_latency is not None and shortest > self.max_latency:
            return PolicyError(
                f"no plan finishes a request within {self.max_latency:g} s: the quickest takes "
                f"{shortest:.3g} s",
                hint=f"raise --max-latency to {shortest:.3g}, or give more memory",
            )
        if self.deadline is not None and fastest > self.deadline:
            return PolicyError(
                f"no plan finishes the job within {self.deadline:g} s: the fastest takes "
                f"{fastest:.3g} s",
                hint=f"raise --deadline to {fastest:.3g}, or lower --requests",
            )
        return PolicyError(
            f"no plan meets both --max-latency {self.max_latency:g} and --deadline "
            f"{self.deadline:g}: requests take {shortest:.3g} s or more, the job {fastest:.3g} s",
            hint="raise one of them",
        )
