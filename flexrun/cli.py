"""The command `flexrun`: reads flags and files, starts the engine, reports in words.

Exit codes: 0 all done, 1 some requests failed or the run broke, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flexrun import __version__
from flexrun.arguments import build_parser, engine_config, flag_of, sampling_params
from flexrun.batch_job import BatchJob, ProgressBar
from flexrun.errors import FlexrunError, UsageError
from flexrun.job_file import JobFile
from flexrun.job_record import fingerprint, job_lengths, with_recorded_bits
from flexrun.model_files import resolve_model
from flexrun.report import report_text
from flexrun.result_file import ResultFile
from flexrun.tokenizer import Tokenizer
from flexrun.trace import check_writable
from policy_search.bits import bits_in_words
from policy_search.flags import workload
from policy_search.model_config import ModelConfig

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from flexrun.batch_job import JobEngine
    from flexrun.config import EngineConfig

DONE, BROKEN, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    try:
        arguments = build_parser(__version__).parse_args(argv)
        commands = {
            "check": check,
            "prepare": prepare,
            "bench": bench,
            "eval-ppl": eval_ppl,
            "generate": generate,
        }
        return commands[arguments.command](arguments)
    except FlexrunError as error:
        return _report(error, BAD_USAGE)
    except KeyboardInterrupt:
        print("flexrun: interrupted", file=sys.stderr)
        return INTERRUPTED


def check(arguments: argparse.Namespace) -> int:
    """Say whether a model can be run exactly."""
    from flexrun.architecture_check import main_check

    return main_check(arguments.model)


def prepare(arguments: argparse.Namespace) -> int:
    """Write the disk copy of a model's weights ahead of a job."""
    from flexrun.prepare import main_prepare  # imports torch

    config = engine_config(vars(arguments), flag_of)
    return main_prepare(config, copy=arguments.copy)


def bench(arguments: argparse.Namespace) -> int:
    """Run a job of published lengths."""
    from flexrun.bench import main_bench  # imports numpy

    job = workload(arguments)
    config = engine_config(vars(arguments), flag_of)
    if config.trace is not None:
        check_writable(config.trace)
    if config.policy is None and job.requests:
        config = replace(config, job_lengths=job.job())
    with ExitStack() as stack:
        engine = make_engine(config, None, lambda bits: None)
        stack.callback(engine.close)
        code = main_bench(engine, job)
        engine.write_trace()
        return code


def eval_ppl(arguments: argparse.Namespace) -> int:
    """Compute the perplexity of a text."""
    from flexrun.perplexity import main_perplexity  # imports torch

    config = engine_config(vars(arguments), flag_of)
    shape = arguments.context, arguments.stride, arguments.chunk, arguments.text_tokens
    return main_perplexity(config, arguments.text, *shape)


def generate(arguments: argparse.Namespace) -> int:
    """Run a job. All that is cheap to check is checked before the model is loaded."""
    defaults = sampling_params(arguments)
    config = engine_config(vars(arguments), flag_of)
    if config.trace is not None:
        check_writable(config.trace)
    with ExitStack() as stack:
        job = JobFile(arguments.input, defaults)
        stack.callback(job.close)
        given, config = config, with_recorded_bits(job, config, arguments.output)
        results = ResultFile(arguments.output, arguments.input, fingerprint(job, config))
        stack.callback(results.close)
        if results.finished:
            print(f"continuing: {len(results.finished)} requests are finished", file=sys.stderr)
        if config != given:
            bits = config.quantization
            text = bits_in_words(bits.weight_bits, bits.kv_bits)
            print(f"as the job began: {text}", file=sys.stderr)
        if all(line.error or line.index in results.finished for line in job):
            return _finish_without_model(job, results)
        tokenizer = _tokenizer_for(job, config)
        if config.policy is None:  # else nothing is planned
            config = replace(config, job_lengths=job_lengths(job, tokenizer, _context_of(config)))
        engine = make_engine(config, tokenizer, partial(_settle, job, config, results))
        stack.callback(engine.close)
        print(engine.describe(), file=sys.stderr)
        return _run(job, results, engine, tokenizer)


def make_engine(
    config: EngineConfig, tokenizer: Tokenizer | None, on_bits: Callable[[dict[str, Any]], None]
) -> JobEngine:
    """Load the model; `on_bits` is told what its plan has chosen, before weights are quantized."""
    from flexrun.engine import Engine  # imports torch

    return Engine(config, tokenizer, on_bits)


def _settle(job: JobFile, config: EngineConfig, results: ResultFile, bits: dict[str, Any]) -> None:
    """Bits that were chosen are from now on this job's, whoever continues it."""
    results.record(fingerprint(job, replace(config, **bits)))


def _context_of(config: EngineConfig) -> int | None:
    """As its config.json says, without torch."""
    try:
        return ModelConfig.load(resolve_model(config.model)).context_length
    except FlexrunError:
        return None


def _tokenizer_for(job: JobFile, config: EngineConfig) -> Tokenizer | None:
    directory = resolve_model(config.model)
    try:
        return Tokenizer.load(directory)
    except UsageError:
        if job.needs_tokenizer:
            raise
        print("flexrun: the model has no tokenizer: texts will be empty", file=sys.stderr)
        return None


def _run(job: JobFile, results: ResultFile, engine: JobEngine, tokenizer: Tokenizer | None) -> int:
    progress = ProgressBar(job.num_requests, len(results.finished))
    skipped, batch = len(results.finished), BatchJob(job, results, tokenizer)
    try:
        with closing(progress):
            batch.run(engine, progress)
        results.close()
        engine.write_trace()
    except FlexrunError as error:
        return _report(error, BROKEN)
    except KeyboardInterrupt:
        print(
            f"flexrun: interrupted with {len(results.finished)} of {job.num_requests} requests "
            "finished; running the same command again continues",
            file=sys.stderr,
        )
        return INTERRUPTED
    summary = engine.summary()
    print(report_text(summary), file=sys.stderr)
    return _finish(batch, results, skipped, summary)


def _finish_without_model(job: JobFile, results: ResultFile) -> int:
    skipped, batch = len(results.finished), BatchJob(job, results, None)
    batch.fail_all()
    results.close()
    summary = {"prompt_tokens": 0, "generated_tokens": 0, "sweeps": 0}
    return _finish(batch, results, skipped, summary)


def _finish(batch: BatchJob, results: ResultFile, skipped: int, summary: dict[str, Any]) -> int:
    counts = {"requests": batch.requests, "failed": batch.failed, "skipped": skipped}
    failed = batch.failed + results.failed_before
    if failed:
        print(f"flexrun: {failed} requests failed; see error in {results.path}", file=sys.stderr)
    print(json.dumps(counts | summary), flush=True)
    return BROKEN if failed else DONE


def _report(error: FlexrunError, code: int) -> int:
    print(f"flexrun: error: {error}", file=sys.stderr)
    return code
