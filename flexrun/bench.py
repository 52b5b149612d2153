"""`flexrun bench`: a job of published lengths with random tokens, and what it took."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flexrun.batch_job import ProgressBar
from flexrun.errors import UsageError
from flexrun.report import report_text
from flexrun.request import Request, SamplingParams
from policy_search.workload import draw_lengths, longest_output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexrun.batch_job import JobEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What `policy-search simulate` takes under the same names."""

    workload: str = "conv"
    requests: int = 256
    scale: float = 1.0
    prompt_len: int = 512
    gen_len: int = 32
    seed: int = 0
    known_lengths: bool = False
    """The engine is told each request's output length; else only the longest there may be."""

    def __post_init__(self) -> None:
        for name, least in {"requests": 0, "prompt_len": 1, "gen_len": 1}.items():
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} must be at least {least}, not {getattr(self, name)}")

    def make_requests(self, vocab_size: int) -> Iterator[Request]:
        """Prompts of random tokens, whose completions end after as many tokens as were drawn."""
        drawn = draw_lengths(
            self.workload,
            self.requests,
            seed=self.seed,
            scale=self.scale,
            prompt_len=self.prompt_len,
            gen_len=self.gen_len,
        )
        longest = longest_output(self.workload, scale=self.scale, gen_len=self.gen_len)
        random = np.random.default_rng(self.seed)
        for index, (prompt, output) in enumerate(drawn):
            most = output if self.known_lengths else longest
            tokens = tuple(random.integers(vocab_size, size=prompt).tolist())
            params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
            yield Request(index, index, None, tokens, params, ends_after=output)


def run_bench(engine: JobEngine, workload: Workload) -> dict[str, Any]:
    """Run the job; the numbers of its JSON object. Raises `RequestError` if a length cannot fit."""
    needed = 0
    requests = list(workload.make_requests(engine.vocab_size))
    for request in requests:
        engine.check_request(request)
    for request in requests:
        engine.add_request(request)
        # The last token of a sequence has no row of its own.
        needed += len(request.prompt_token_ids) + (request.ends_after or 0) - 1
    progress, finished = ProgressBar(len(requests)), 0
    while engine.has_unfinished:
        done = len(engine.step())
        finished += done
        progress.update(done, engine.progress())
    progress.close()
    return {"requests": finished, "rows_needed": needed} | engine.summary()


def main_bench(engine: JobEngine, workload: Workload) -> int:
    """Run the job and print what it took."""
    print(engine.describe(), file=sys.stderr)
    summary = run_bench(engine, workload)
    print(report_text(summary), file=sys.stderr)
    print(json.dumps(summary), flush=True)
    return 0
