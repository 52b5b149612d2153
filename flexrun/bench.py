"""`flexrun bench`: a job of published lengths with random tokens, and what it took."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from flexrun.batch_job import ProgressBar
from flexrun.report import report_text
from flexrun.request import Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexrun.batch_job import JobEngine
    from policy_search.workload import Workload


def make_requests(workload: Workload, vocab_size: int) -> Iterator[Request]:
    """Prompts of random tokens, whose completions end after as many tokens as were drawn."""
    random = np.random.default_rng(workload.seed)
    for index, (prompt, output) in enumerate(workload.lengths()):
        tokens = tuple(random.integers(vocab_size, size=prompt).tolist())
        most = workload.max_tokens or output
        params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
        yield Request(index, index, None, tokens, params, ends_after=output)


def run_bench(engine: JobEngine, workload: Workload) -> dict[str, Any]:
    """Run the job; the numbers of its JSON object. Raises `RequestError` if a length cannot fit."""
    needed = 0
    requests = list(make_requests(workload, engine.vocab_size))
    for request in requests:
        engine.check_request(request)
    for request in requests:
        engine.add_request(request)
        # The last token of a sequence has no row of its own.
        needed += len(request.prompt_token_ids) + (request.ends_after or 0) - 1
    finished = 0
    with closing(ProgressBar(len(requests))) as progress:
        while engine.has_unfinished:
            done = len(engine.step())
            finished += done
            progress.update(done, engine.progress())
    return {"requests": finished, "rows_needed": needed} | engine.summary()


def main_bench(engine: JobEngine, workload: Workload) -> int:
    """Run the job and print what it took."""
    print(engine.describe(), file=sys.stderr)
    summary = run_bench(engine, workload)
    print(report_text(summary), file=sys.stderr)
    print(json.dumps(summary), flush=True)
    return 0
