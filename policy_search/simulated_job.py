"""The requests that a command line asks to simulate (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from policy_search.arrivals import TimedRequest, at_once, poisson
from policy_search.flags import workload
from policy_search.prompt_lengths import lengths_of_token_ids
from policy_search.trace_file import read_trace
from policy_search.workload import Lengths, Workload

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

    LengthsOfFile = Callable[[Path, int, str], list[Lengths]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedJob:
    """Requests, and what schedulers are told of them."""

    source: str
    requests: list[TimedRequest]
    max_tokens: int | None
    """Most that any of them generates; None: schedulers are told each one's own."""

    @property
    def lengths(self) -> list[Lengths]:
        """Without arrivals."""
        return [Lengths(request.prompt, request.output) for request in self.requests]

    @property
    def most_tokens(self) -> list[int]:
        """Of every request, as far as schedulers know."""
        return [each.prompt + (self.max_tokens or each.output) for each in self.requests]

    @classmethod
    def asked_for(
        cls,
        arguments: argparse.Namespace,
        lengths_of_file: LengthsOfFile,
    ) -> SimulatedJob:
        """From --trace, --input or --workload. Raises `PolicyError`.

        `lengths_of_file(path, gen_len, model)` counts the tokens of prompts with a tokenizer.
        Requests beyond --context are left out, as DistServe does (OSDI 2024).
        """
        if arguments.trace is not None:
            requests = read_trace(arguments.trace)
            requests = [each for each in requests if _fits(each, arguments.context)]
            longest = max((each.output for each in requests), default=1)
            most = None if arguments.known_lengths else longest
            return cls(source=arguments.trace.name, requests=requests, max_tokens=most)
        if arguments.input is not None:
            source, most = arguments.input.name, None
            known = arguments.input, arguments.gen_len or Workload().gen_len
            if arguments.model is None:
                lengths = lengths_of_token_ids(*known)
            else:
                lengths = lengths_of_file(*known, arguments.model)
        else:
            job = workload(arguments)
            source, lengths, most = job.workload, job.lengths(), job.max_tokens
        lengths = [each for each in lengths if _fits(each, arguments.context)]
        if arguments.rate is None:
            requests = at_once(lengths)
        else:
            requests = poisson(lengths, arguments.rate, arguments.seed)
        return cls(source=source, requests=requests, max_tokens=most)


def _fits(request: TimedRequest | Lengths, context: int | None) -> bool:
    return context is None or request.prompt + request.output <= context
