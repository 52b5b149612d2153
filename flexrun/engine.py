"""The engine: schedule, run, commit, until every request is finished."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from flexrun.half_batch import with_half_the_batch
from flexrun.report import RunCounters
from flexrun.request import RequestOutput
from flexrun.request_check import check_request
from flexrun.runtime import Runtime
from flexrun.sampler import sample
from flexrun.sequence import Sequence, make_sequences
from flexrun.speculation import right_guesses
from flexrun.tokenizer import end_token_ids
from flexrun.trace import write_trace
from offload.errors import CapacityError, DeviceMemoryError
from policy_search.bits import CHOSEN

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexrun.config import EngineConfig
    from flexrun.plan import SweepPlan
    from flexrun.request import CompletionOutput, Request
    from flexrun.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Engine:
    """Loads a model under its budgets and completes requests, sweep by sweep."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        on_bits: Callable[[dict[str, Any]], None] = lambda bits: None,
    ) -> None:
        """`on_bits` is told the bits that the plan has chosen, before weights are quantized."""
        self._config = config
        self._tokenizer = tokenizer
        self._counters = RunCounters()
        self._open(config, on_bits)
        self._end_ids = end_token_ids(self._runtime.directory, tokenizer)
        self._sequences: dict[int, Sequence] = {}
        self._done: dict[int, dict[int, CompletionOutput]] = {}
        self._next_number = 0
        self._closed = False

    def _open(
        self,
        config: EngineConfig,
        on_bits: Callable[[dict[str, Any]], None] = lambda bits: None,
    ) -> None:
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            self._runtime = Runtime(config, stack, on_bits)
            self._runtime.measure_links()
            self._closing = stack.pop_all()
        self._counters.load_seconds += time.perf_counter() - start
        self._sweeps_before = len(self._counters.sweep_seconds)

    def _reopen(self, shortage: str) -> None:
        """Go on with micro-batches of half the rows: the device had no memory for a sweep.

        The sweep was broken off somewhere, so everything is built anew; what running sequences had
        stored is computed again. Raises `CapacityError` if micro-batches cannot be smaller.
        """
        self._config = with_half_the_batch(self._config, self._runtime, shortage)
        logger.warning("%s: going on with half the rows", shortage)
        self._runtime.learn(self._seconds)
        self._closing.close()
        self._open(self._config)
        for number, sequence in self._sequences.items():
            most = self._most_tokens(sequence.request)
            if not self._runtime.scheduler.pools.fits_ever(most):
                raise CapacityError(f"{shortage}; what is left is too little for {most} tokens")
            self._runtime.scheduler.add(number, len(sequence.tokens), most)

    @property
    def context_length(self) -> int:
        """Most positions of one sequence, prompt included."""
        return self._runtime.model.context_length

    @property
    def vocab_size(self) -> int:
        return self._runtime.model.vocab_size

    @property
    def max_sequences(self) -> int:
        """Most sequences that run at the same time."""
        return self._runtime.policy.max_sequences

    @property
    def bits(self) -> dict[str, int]:
        """Bits of weights and of keys and values, by the fields of a policy."""
        return {name: getattr(self._runtime.policy, name) for name in CHOSEN}

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    def check_request(self, request: Request) -> None:
        """Raise `RequestError` if `request` can never be served."""
        pools = self._runtime.scheduler.pools
        check_request(
            request,
            vocab_size=self.vocab_size,
            context_length=self.context_length,
            has_tokenizer=self._tokenizer is not None,
            fits=pools.fits_ever(self._most_tokens(request)),
        )

    def _most_tokens(self, request: Request) -> int:
        wanted = len(request.prompt_token_ids) + request.sampling_params.max_tokens
        return min(wanted, self.context_length)

    def add_request(self, request: Request) -> None:
        """Queue `request`. Raises `RequestError` if it can never be served."""
        self.check_request(request)
        most = self._most_tokens(request)
        prompt = len(request.prompt_token_ids)
        sequences = make_sequences(
            request,
            self._next_number,
            self._tokenizer,
            self._end_ids,
            min(most - prompt, request.ends_after or most),
            self._config.seed,
        )
        self._next_number += len(sequences)
        self._done[request.index] = {}
        group = sequences[0].number if len(sequences) > 1 else None
        for sequence in sequences:
            self._sequences[sequence.number] = sequence
            self._runtime.scheduler.add(sequence.number, prompt, most, group)
        self._counters.prompt_tokens += prompt

    def step(self) -> list[RequestOutput]:
        """One sweep; the requests that are finished with it."""
        start = time.perf_counter()
        scheduler, counters = self._runtime.scheduler, self._counters
        drafts = self._draft()
        plan = scheduler.next_sweep({number: len(ids) for number, ids in drafts.items()})
        if plan.empty:
            assert not self._sequences, "sequences wait, but none can run"
            return []
        tokens = {span.sequence: self._sequences[span.sequence].tokens for span in plan.spans}
        for span in plan.spans:
            if span.drafts:
                tokens[span.sequence] = tokens[span.sequence] + drafts[span.sequence]
        running = len(scheduler.running)
        shortage = ""
        try:
            chosen = self._runtime.run(plan, tokens, self._choose)
        except DeviceMemoryError as error:
            shortage = error.message  # the error itself holds on to what the sweep had allocated
        if shortage:
            self._reopen(shortage)
            return []
        finished = self._commit(self._accept(plan, chosen, drafts))
        counters.sweep(plan.rows, running, time.perf_counter() - start)
        return finished

    def _draft(self) -> dict[int, list[int]]:
        """Guessed tokens of sequences that generate, if a sweep has rows for them."""
        scheduler = self._runtime.scheduler
        if scheduler.speculation.most_rows <= len(scheduler.running):
            return {}
        numbers = (number for number in scheduler.running if number not in scheduler.prompts)
        drafts = ((number, self._sequences[number].draft()) for number in numbers)
        return {number: ids for number, ids in drafts if ids}

    def _choose(self, numbers: list[int], logits: torch.Tensor) -> torch.Tensor:
        sequences = [self._sequences[number] for number in numbers]
        # Rows of one sequence follow each other: the first of them chooses its next token.
        first = dict(zip(reversed(numbers), reversed(range(len(numbers)))))
        ahead = [place - first[number] for place, number in enumerate(numbers)]
        return sample(
            logits,
            [sequence.request.sampling_params for sequence in sequences],
            [sequence.random(n) for sequence, n in zip(sequences, ahead)],
            [sequence.checker.banned(n) for sequence, n in zip(sequences, ahead)],
        )

    def _accept(
        self, plan: SweepPlan, chosen: dict[int, list[int]], drafts: dict[int, list[int]]
    ) -> dict[int, list[int]]:
        """What each sequence goes on with: the tokens chosen up to the first wrong guess.

        Each row chooses with its position's own random number, so tokens are those that single rows
        would have chosen. For a guess without a probability of its own this accepts as often as
        rejection sampling does (Leviathan, 2023): with the probability of the guessed token.
        """
        accepted, broken = {}, []
        for number, _, _, _, drafted in plan.spans:
            if drafted:
                ids = chosen[number]
                right = accepted[number] = right_guesses(drafts[number][:drafted], ids)
                chosen[number] = ids[: right + 1]
                if any(token < 0 for token in ids[right + 1 :]):
                    broken.append(number)
                self._sequences[number].drafter.learn(drafted, right)
                self._counters.drafted_tokens += drafted
        self._runtime.scheduler.commit(plan, accepted)
        for number in broken:
            # A wrong guess gave no numbers. They must not stay in the pages, but tokens are as well
            # off as without the guess.
            self._runtime.kv_cache.erase(number)
            self._runtime.scheduler.preempt(number)
        return chosen

    def _commit(self, chosen: dict[int, list[int]]) -> list[RequestOutput]:
        finished = []
        for number, tokens in chosen.items():
            for place, token in enumerate(tokens):
                sequence = self._sequences.get(number)
                if sequence is None:
                    break  # it has ended, or its request failed earlier in this sweep
                if token < 0:
                    finished.append(self._fail(sequence.request))
                    break
                self._counters.generated_tokens += 1
                self._counters.accepted_tokens += place < len(tokens) - 1  # the last is no guess
                if sequence.append(token):
                    self._runtime.scheduler.finish(number)
                    del self._sequences[number]
                    finished.extend(self._complete(sequence))
        return finished

    def _complete(self, sequence: Sequence) -> list[RequestOutput]:
        request = sequence.request
        done = self._done[request.index]
        done[sequence.sample_index] = sequence.output()
        if len(done) < request.sampling_params.n:
            return []
        del self._done[request.index]
        return [RequestOutput.of(request, [done[index] for index in sorted(done)])]

    def _fail(self, request: Request) -> RequestOutput:
        for number in [n for n, s in self._sequences.items() if s.request is request]:
            self._runtime.kv_cache.erase(number)
            self._runtime.scheduler.finish(number)
            del self._sequences[number]
        self._done.pop(request.index, None)
        message = "the model produced logits that are not numbers"
        return RequestOutput.of(request, error={"code": "nan_logits", "message": message})

    def progress(self) -> RunCounters:
        """Cumulative counters."""
        return self._counters

    def summary(self) -> dict[str, Any]:
        """What the run did, for the final JSON object."""
        runtime = self._runtime
        runtime.transfers.drain()  # or the last bytes would not be counted
        summary = self._counters.summary(
            runtime.transfers, runtime.backend.account, runtime.raw_speeds
        )
        scheduler = runtime.scheduler
        return summary | {
            "preemptions": scheduler.preemption.count,
            "swaps": scheduler.preemption.swaps,
            "promotions": scheduler.promotions,
            **({} if runtime.bits is None else {"bits": runtime.bits.summary}),
            **runtime.foreseen(self._seconds),
        }

    @property
    def _seconds(self) -> float:
        """Of sweeps under the present plan."""
        return sum(self._counters.sweep_seconds[self._sweeps_before :])

    def describe(self) -> str:
        """The plan, for people."""
        return self._runtime.describe()

    def write_trace(self) -> None:
        """Write the trace that the configuration asks for, if it does. Raises `UsageError`."""
        if self._config.trace is not None:
            timeline = self._runtime.timeline
            write_trace(self._config.trace, timeline.finish())
            if timeline.dropped:
                logger.warning("the trace has the job's first part only: it was full")

    def close(self) -> None:
        """Give all memory, threads and files back; remember what predictions got wrong."""
        try:
            if not self._closed:
                self._closed = True
                self._runtime.learn(self._seconds)
        finally:
            self._sequences.clear()
            self._closing.close()
