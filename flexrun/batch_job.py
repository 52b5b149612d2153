"""The loop of a job: lines in, sweeps, results out, and the numbers that people watch meanwhile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from flexrun.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from flexrun.job_file import JobLine
    from flexrun.request import Request, RequestOutput
    from flexrun.result_file import ResultFile
    from flexrun.tokenizer import Tokenizer

_WAITING_PER_SEQUENCE = 4  # enough to always have one ready; few enough to hold no huge file


class Counts(Protocol):
    """Cumulative counters of an engine."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def generated_tokens(self) -> int: ...

    @property
    def sweeps(self) -> int: ...


class JobEngine(Protocol):
    """What a job needs of an engine; `flexrun.engine.Engine` is the one, tests bring their own."""

    @property
    def max_sequences(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def has_unfinished(self) -> bool: ...

    def check_request(self, request: Request) -> None: ...

    def add_request(self, request: Request) -> None: ...

    def step(self) -> list[RequestOutput]: ...

    def progress(self) -> Counts: ...

    def summary(self) -> dict[str, Any]: ...

    def describe(self) -> str: ...

    def write_trace(self) -> None: ...

    def close(self) -> None: ...


class ProgressBar:
    """A bar on stderr: requests done, tokens per second, sweeps."""

    def __init__(self, total: int, done: int = 0, *, shown: bool | None = None) -> None:
        """`shown=None` shows the bar only on a terminal."""
        from tqdm import tqdm

        disable = None if shown is None else not shown
        self._bar = tqdm(total=total, initial=done, unit="request", disable=disable)
        self._start = time.monotonic()

    def update(self, finished: int, counts: Counts) -> None:
        """Show that `finished` more requests are done."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix(
            {
                "prompt": f"{counts.prompt_tokens / seconds:.0f} tok/s",
                "generated": f"{counts.generated_tokens / seconds:.0f} tok/s",
                "sweeps": counts.sweeps,
            },
            refresh=False,
        )
        self._bar.update(finished)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class BatchJob:
    """One run over a job's lines, writing each result as soon as there is one."""

    def __init__(
        self, lines: Iterable[JobLine], results: ResultFile, tokenizer: Tokenizer | None
    ) -> None:
        self.requests = 0
        """Requests that got their result in this run."""
        self.failed = 0
        """Those of them that failed."""
        self._lines: Iterator[JobLine] = iter(lines)
        self._results = results
        self._skipped = frozenset(results.finished)
        self._tokenizer = tokenizer
        self._in_flight = 0

    def run(self, engine: JobEngine, progress: ProgressBar) -> None:
        """Feed, step and write until nothing is left."""
        while True:
            before = self.requests
            self._feed(engine)
            if not engine.has_unfinished:
                break
            for output in engine.step():
                self._in_flight -= 1
                self._write(output)
            progress.update(self.requests - before, engine.progress())

    def fail_all(self) -> None:
        """Write the results of lines of which none can run."""
        for line in self._lines:
            if line.index not in self._skipped and line.error is not None:
                self._write(line.failed(line.error))

    def _feed(self, engine: JobEngine) -> None:
        """Keep a bounded number of tokenized requests waiting in the engine."""
        most = engine.max_sequences * (1 + _WAITING_PER_SEQUENCE)
        while self._in_flight < most and (line := next(self._lines, None)) is not None:
            if line.index in self._skipped:
                continue
            try:
                engine.add_request(line.to_request(self._tokenizer))
                self._in_flight += 1
            except RequestError as error:
                self._write(line.failed(error))

    def _write(self, output: RequestOutput) -> None:
        self._results.write(output)
        self.requests += 1
        self.failed += output.error is not None
