"""How long prompts and outputs are: published length tables, drawn from with a seed (no torch)."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple

from policy_search.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

_QUANTILES = [*range(0, 100, 5), 97.5, 99, 99.9, 100]
"""Percent, of the lengths in a table."""


class Lengths(NamedTuple):
    """Tokens of one request."""

    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class JobLengths:
    """A whole job in a few numbers, for predictions."""

    sequences: int
    prompt: float
    """Mean tokens of a prompt, and …"""
    output: float
    """… of what is generated."""
    longest: float = 0.0
    """Most tokens that a sequence generates; less than the mean: all generate as many."""
    prompts: tuple[int, ...] = ()
    """Tokens of each, in the job's order, or of some from all over it; none: they are not known."""
    most_tokens: int = 0
    """Of one sequence: its prompt and all that it may generate; 0: what is known of both."""

    @classmethod
    def of(cls, lengths: Sequence[Lengths]) -> JobLengths:
        """Of at least one request."""
        count = len(lengths)
        prompt, output = (sum(each) / count for each in zip(*lengths))
        prompts = tuple(each.prompt for each in lengths)
        longest, most = max(each.output for each in lengths), max(map(sum, lengths))
        return cls(count, prompt, output, longest, prompts, most)

    @property
    def longest_sequence(self) -> int:
        """Tokens that have to fit into the KV cache for all requests to be served."""
        prompt = max(self.prompts, default=math.ceil(self.prompt))
        return self.most_tokens or prompt + math.ceil(max(self.output, self.longest))

    def within(self, context_length: int) -> JobLengths:
        """The same for a model of this context, in which completions end."""
        prompt = min(self.prompt, context_length - 1)
        room = context_length - prompt
        prompts = tuple(min(each, context_length - 1) for each in self.prompts)
        output, longest = min(self.output, room), min(self.longest, room)
        most = min(self.most_tokens, context_length)
        return JobLengths(self.sequences, prompt, output, longest, prompts, most)

    def drawn(self, seed: int, context_length: int) -> list[Lengths]:
        """Such a job, request by request: its prompts where they are known, and outputs that
        nobody knows before. Sorted, they rise as a power of their rank, up to the `longest`, the
        one that has the mean of all (of many); but none is less than a token, or more than the
        context holds.
        """
        longest = max(self.output, self.longest)
        power = longest / self.output - 1 if self.output else 0.0
        ranks = [(number + 0.5) / self.sequences for number in range(self.sequences)]
        outputs = [max(1, round(longest * rank**power)) for rank in ranks]
        random.Random(seed).shuffle(outputs)
        prompts = self.prompts or (max(1, round(self.prompt)),)
        return [
            Lengths(prompt, max(1, min(output, context_length - prompt)))
            for prompt, output in zip(cycle(prompts), outputs)
        ]


@dataclass(frozen=True, slots=True)
class LengthTable:
    """Lengths at the `_QUANTILES` of a trace, between which they are interpolated."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    source: str
    most_tokens: int | None = None
    """That no request of the trace exceeds, prompt and output together."""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


TABLES = {
    "conv": LengthTable(
        _numbers(
            "2 181 207 372 387 396 403 414 703 984 1020 1045 1071 1097 1130 1189 1315 1876 2734 "
            "4083 4092 4142 6179 14050"
        ),
        _numbers(
            "7 41 54 67 77 85 91 96 103 113 129 151 177 217 384 395 400 411 424 451 522 601 954 "
            "1000"
        ),
        "conversations, Azure LLM inference trace 2023 (Splitwise, ISCA 2024), 19 366 requests",
    ),
    "code": LengthTable(
        _numbers(
            "3 75 147 232 386 578 770 939 1075 1261 1469 1690 1909 2164 2433 2744 3192 3920 5188 "
            "7303 7435 7436 7437 7437"
        ),
        _numbers("6 6 7 7 8 9 9 10 11 12 13 14 16 18 20 24 29 39 55 90 145 251 825 1899"),
        "code completion, Azure LLM inference trace 2023 (Splitwise, ISCA 2024), 8 819 requests",
    ),
    "summarization": LengthTable(
        _numbers(
            "1 749 1242 1564 1802 1986 2150 2308 2453 2596 2730 2861 2996 3127 3249 3370 3490 3597 "
            "3702 3813 3876 3933 4012 4054"
        ),
        _numbers(
            "5 60 78 92 104 115 125 135 145 156 167 179 192 206 222 242 268 304 372 736 2507 3271 "
            "3844 4056"
        ),
        "arXiv summarization with Llama 2's tokenizer (Vidur, MLSys 2024), 28 257 requests",
        most_tokens=4096,
    ),
}
"""In these traces long prompts do not go with long outputs (correlation -0.11 and 0.00), so the two
are drawn independently. In the last one their sum has a limit (correlation -0.46): the prompt gives
way, because long outputs are few."""

WORKLOADS = (*TABLES, "fixed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A job of requests whose lengths are drawn from a table. Raises `PolicyError`."""

    workload: str = "conv"
    """One of `WORKLOADS`; `fixed` gives all requests `prompt_len` and `gen_len` tokens."""
    requests: int = 2048
    scale: float = 1.0
    """Multiplies all lengths, which stay at least 1."""
    prompt_len: int = 512
    gen_len: int = 32
    seed: int = 0
    """The same one gives the same lengths."""
    known_lengths: bool = False
    """Schedulers are told each request's output length; else only the longest there may be."""

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            known = ", ".join(WORKLOADS)
            raise PolicyError(f"unknown workload {self.workload!r}", hint=f"known: {known}")
        if self.requests < 0:
            raise PolicyError(f"--requests must be at least 0, not {self.requests}")
        if not 0 < self.scale <= 1e6:
            raise PolicyError(
                f"the scale must be above 0, not {self.scale:g}", hint="1 keeps all lengths"
            )

    def lengths(self) -> list[Lengths]:
        """Of every request."""
        import numpy as np  # it takes a while, and flags are read without it

        if self.workload == "fixed":
            pairs = np.array([[self.prompt_len, self.gen_len]]).repeat(self.requests, 0)
        else:
            places = np.random.default_rng(self.seed).random((self.requests, 2))
            pairs = _drawn(TABLES[self.workload], places)
        scaled = np.maximum(1, np.rint(pairs * self.scale)).astype(int)
        return [Lengths(*pair) for pair in scaled.tolist()]

    def job(self) -> JobLengths:
        """All requests, of at least one, each with room for the most that it may generate."""
        lengths, most = self.lengths(), self.max_tokens
        room = max(each.prompt + (most or each.output) for each in lengths)
        return replace(JobLengths.of(lengths), most_tokens=room)

    @property
    def max_tokens(self) -> int | None:
        """What schedulers know: the most that any request generates, or None: its own output."""
        if self.known_lengths:
            return None
        fixed = self.workload == "fixed"
        most = self.gen_len if fixed else TABLES[self.workload].output[-1]
        return max(1, round(most * self.scale))


def _drawn(table: LengthTable, places: np.ndarray) -> np.ndarray:
    """Lengths [n, 2] at `places` [n, 2] of the distribution, in [0, 1)."""
    import numpy as np

    prompt, output = (
        np.interp(100 * places[:, column], _QUANTILES, lengths)
        for column, lengths in enumerate((table.prompt, table.output))
    )
    if table.most_tokens is not None:
        prompt = np.minimum(prompt, table.most_tokens - output)
    return np.stack([prompt, output], 1)
