"""The command `policy-search`: what should live where, and how long a job takes.

Plans take a few seconds, without torch; `simulate` runs a job on a virtual clock; `calibrate`
measures the machine.

Exit codes: 0 there is a plan, 2 wrong usage, or a model that does not fit.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from compression.errors import FlexrunError
from policy_search.flags import Parser
from policy_search.named_models import named_config
from policy_search.plan_command import add_plan_flags, run_plan
from policy_search.simulate_command import add_simulate_flags, run_simulate
from policy_search.workload import Lengths

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from policy_search.workload import JobLengths

DONE, BAD_USAGE = 0, 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of `policy-search`."""
    parser = Parser(
        prog="policy-search",
        description="Find what of a model goes where on this machine, or on another one, and how "
        "large the batch is, for a job; say how fast that is, what bounds it and what would help. "
        "No weight is read. `flexrun generate` makes the same plan for its own prompts.",
        epilog="`policy-search calibrate --help`: measure this machine, once. `policy-search "
        "simulate --help`: a job on a virtual clock.",
        allow_abbrev=False,
    )
    add_plan_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except FlexrunError as error:
        print(f"policy-search: error: {error}", file=sys.stderr)
        return BAD_USAGE
    except BrokenPipeError:
        # `| head` has seen enough; nothing more can be written there, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["simulate"]:
        return simulate(words[1:])
    if words[:1] == ["calibrate"]:
        return calibrate(words[1:])
    return run_plan(build_parser().parse_args(words), _lengths_of)


def simulate(words: Sequence[str]) -> int:
    """Run a simulation's command line. Raises `FlexrunError`."""
    from flexrun.schedulers import SCHEDULERS  # an entry point wires packages together

    parser = Parser(
        prog="policy-search simulate",
        description="Run a job of published lengths, prompts or a trace on a virtual clock: the "
        "scheduler and the KV pages of the engine, on one machine or several, with each sweep's "
        "time from the cost model. No model is loaded. Without --policy, all weights arrive in "
        "every sweep, at the speeds of --hardware, or of a common GPU where that is auto.",
        allow_abbrev=False,
    )
    add_simulate_flags(parser)
    return run_simulate(parser.parse_args(words), SCHEDULERS, _lengths_of_each)


def calibrate(words: Sequence[str]) -> int:
    """Measure this machine. Raises `FlexrunError`."""
    from flexrun.calibrate_command import add_calibrate_flags, run_calibrate  # imports torch

    parser = Parser(
        prog="policy-search calibrate",
        description="Measure what this machine's links, memories and processors can do, once: "
        "plans and jobs find it from then on.",
        allow_abbrev=False,
    )
    add_calibrate_flags(parser)
    return run_calibrate(parser.parse_args(words))


def _lengths_of(path: Path, model: Path, max_tokens: int, context_length: int) -> JobLengths | None:
    """Of the prompts in a file, as the model's tokenizer counts them. Raises `FlexrunError`."""
    from contextlib import closing

    from flexrun.job_file import JobFile
    from flexrun.job_record import job_lengths
    from flexrun.request import SamplingParams
    from flexrun.tokenizer import Tokenizer

    with closing(JobFile(path, SamplingParams(max_tokens=max_tokens))) as job:
        tokenizer = Tokenizer.load(model) if job.needs_tokenizer else None
        return job_lengths(job, tokenizer, context_length)


def _lengths_of_each(path: Path, gen_len: int, model: str) -> list[Lengths]:
    """Of every completion of the prompts in a file. Raises `FlexrunError`."""
    from contextlib import closing

    from flexrun.job_file import JobFile, token_ids_of
    from flexrun.request import SamplingParams
    from flexrun.tokenizer import Tokenizer

    found = []
    with closing(JobFile(path, SamplingParams(max_tokens=gen_len))) as job:
        tokenizer = Tokenizer.load(named_config(model).directory) if job.needs_tokenizer else None
        for line in job:
            if (params := line.sampling_params) is not None:
                length = Lengths(len(token_ids_of(line.prompt, tokenizer)), params.max_tokens)
                found += [length] * params.n
    return found


if __name__ == "__main__":
    sys.exit(main())
