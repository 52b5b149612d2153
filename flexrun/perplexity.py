"""`flexrun eval-ppl`: perplexity of a text over sliding windows, computed by the engine itself.

Windows of `context` tokens begin every `stride` tokens, and each scores the tokens that no earlier
one has scored: all but the first window's have at least context - stride tokens before them. The
perplexity is exp(mean of -log p(token)).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from compression.selection import PLAIN_BITS
from flexrun.errors import UsageError
from flexrun.micro_batches import Cutter
from flexrun.model_files import resolve_model
from flexrun.plan import RowSpan, SweepPlan
from flexrun.runtime import Runtime
from flexrun.tokenizer import Tokenizer
from flexrun.trace import check_writable, write_trace
from policy_search.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from flexrun.config import EngineConfig

_LARGEST = 700.0
"""Logarithm of what a float can hold."""
_LOGITS = 1 << 22
"""Turned into probabilities at a time."""


@dataclass(slots=True)
class Window:
    """Tokens `begin` to `end` of the text, of which those from `first` on are scored."""

    begin: int
    end: int
    first: int
    computed: int = 0
    """Rows that are done; the last token has none."""

    @property
    def rows(self) -> int:
        return self.end - self.begin - 1


@dataclass(slots=True)
class Evaluation:
    """What a text costs under a model."""

    nll: float = 0.0
    """Sum of -log p, natural logarithm."""
    scored: int = 0
    """Tokens that it is of."""
    seconds: float = 0.0
    greedy: dict[int, int] = field(default_factory=dict)
    """The likeliest token at each scored place of the text."""

    @property
    def perplexity(self) -> float:
        """Infinite where it is beyond any number."""
        mean = self.nll / self.scored
        return math.exp(mean) if mean < _LARGEST else math.inf


def windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows over a text of so many tokens, which score each but the first one once."""
    first = 1
    for begin in range(0, tokens - 1, stride):
        end = min(begin + context, tokens)
        yield Window(begin, end, first)
        first = end
        if end == tokens:
            return


def evaluation_policy(config: EngineConfig) -> EngineConfig:
    """The same with room for as many rows of logits as a micro-batch has, unless told otherwise."""
    if config.policy is not None or config.max_sequences is not None:
        return config
    if config.quantization.kv_bits < PLAIN_BITS:
        return config  # two pages of every sequence are on the device: so many are too many
    rows = config.micro_batch_rows or Policy().micro_batch_rows
    return replace(config, max_sequences=rows)


def evaluate(
    config: EngineConfig,
    tokens: Sequence[int],
    context: int,
    stride: int,
    chunk: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of `tokens` under the model, placed as the configuration says.

    Every window is computed `chunk` rows at a time; rows of one chunk attend to each other's keys
    and values before they are stored. So these are a page if pages are packed, unless given. Raises
    `FlexrunError`s.
    """
    if context < 2:
        raise UsageError("a window has at least two tokens", hint="raise --context")
    if not 1 <= stride < context:
        raise UsageError(f"the stride must be from 1 to {context - 1}, not {stride}")
    if len(tokens) < 2:
        raise UsageError("the text has fewer than two tokens", hint="give a longer text")
    with ExitStack() as stack, torch.inference_mode():
        runtime = Runtime(evaluation_policy(config), stack)
        runtime.measure_links()
        if context > runtime.model.context_length:
            raise UsageError(
                f"windows of {context} tokens are longer than the model's context of "
                f"{runtime.model.context_length}",
                hint="lower --context",
            )
        if not runtime.pools.fits_ever(context):
            raise UsageError(
                f"a window of {context} tokens does not fit into the KV cache",
                hint="lower --context, or raise --device-memory",
            )
        chunk = _chunk_that_tells(runtime, context, chunk)
        bar = stack.enter_context(tqdm(total=len(tokens) - 1, unit="token", disable=not progress))
        runner = _Runner(runtime, tokens, chunk)
        start = time.perf_counter()
        done = runner.result
        for scored in runner.run(deque(windows(len(tokens), context, stride))):
            bar.update(scored)
        done.seconds = time.perf_counter() - start
        if config.trace is not None:
            write_trace(config.trace, runtime.timeline.finish())
        return done


def _chunk_that_tells(runtime: Runtime, context: int, chunk: int | None) -> int | None:
    """Rows computed together, so that some attend to packed pages where there are any."""
    tokens = runtime.pools.page_tokens
    if not runtime.pools.keeps_recent:
        return chunk
    chunk = chunk or tokens
    if context <= max(2 * tokens, chunk) + 1:
        raise UsageError(
            f"windows of {context} tokens, {chunk} computed together, read no packed KV page: the "
            f"first page, of {tokens} tokens, and what is computed together are exact",
            hint="raise --context, or lower --chunk",
        )
    return chunk


class _Runner:
    """Keeps sweeps filled with windows, each of which computes a chunk in each of them."""

    def __init__(self, runtime: Runtime, tokens: Sequence[int], chunk: int | None) -> None:
        policy = runtime.policy
        self._runtime = runtime
        self._tokens = tokens
        most_rows = min(policy.micro_batch_rows, policy.logit_rows)  # all may give logits
        self._cutter = Cutter(runtime.pools, most_rows, policy.num_micro_batches)
        self._chunk = min(chunk or most_rows, most_rows, policy.max_rows)
        self._places = max(1, min(policy.max_rows // self._chunk, policy.max_sequences))
        self._active: dict[int, Window] = {}
        self.result = Evaluation()

    def run(self, waiting: deque[Window]) -> Iterator[int]:
        """The tokens that each sweep scored."""
        pools, number = self._runtime.pools, 0
        while waiting or self._active:
            pools.settle()
            while waiting and len(self._active) < self._places:
                if not pools.allocate(number, waiting[0].rows):
                    break
                self._active[number] = waiting.popleft()
                number += 1
            spans = [self._span(each) for each in self._active]
            last = not waiting and all(self._ends(span) for span in spans)
            before = self.result.scored
            batches = self._cutter.cut(spans, sum(span.length for span in spans))
            self._sweep(SweepPlan(batches, last=last))
            for span in spans:
                self._active[span.sequence].computed = span.end
                if self._ends(span):
                    del self._active[span.sequence]
                    pools.release(span.sequence)
            yield self.result.scored - before

    def _ends(self, span: RowSpan) -> bool:
        return span.end == self._active[span.sequence].rows

    def _span(self, number: int) -> RowSpan:
        window = self._active[number]
        start = window.computed
        length = min(self._chunk, window.rows - start)
        scored = min(length, window.begin + start + length + 1 - window.first)
        return RowSpan(number, start, length, scored > 0, max(0, scored - 1))

    def _sweep(self, plan: SweepPlan) -> None:
        """Compute it, and add what its rows say of the tokens that follow."""
        tokens = {
            span.sequence: self._tokens[window.begin : window.end]
            for span in plan.spans
            for window in [self._active[span.sequence]]
        }
        places = {span.sequence: self._scored(span) for span in plan.spans if span.wants_logits}
        sums: list[torch.Tensor] = []

        def choose(sequences: list[int], logits: torch.Tensor) -> torch.Tensor:
            wanted = [at for number in dict.fromkeys(sequences) for at in places[number]]
            sums.append(_nll(logits, [self._tokens[at] for at in wanted]))
            return logits.argmax(-1)

        chosen = self._runtime.run(plan, tokens, choose)
        for number, ids in chosen.items():
            self.result.greedy.update(zip(places[number], ids))
            self.result.scored += len(ids)
        if sums:
            nll = float(torch.stack(sums).sum())
            if not math.isfinite(nll):
                raise UsageError(
                    "the model gives logits that are not numbers",
                    hint="check the checkpoint, or compute in another --dtype",
                )
            self.result.nll += nll

    def _scored(self, span: RowSpan) -> range:
        """Places in the text of the tokens that the span's last rows are about."""
        end = self._active[span.sequence].begin + span.end + 1
        return range(end - 1 - span.drafts, end)


def _nll(logits: torch.Tensor, targets: Sequence[int]) -> torch.Tensor:
    """Sum of -log p of the targets [n]; logits [n, vocabulary]. Does not wait for the device."""
    step = max(1, _LOGITS // logits.shape[1])
    wanted = torch.tensor(targets).to(logits.device, non_blocking=True)
    bounds = pairwise([*range(0, len(targets), step), len(targets)])
    total = logits.new_zeros((), dtype=torch.float64)
    for start, end in bounds:
        rows = logits[start:end].float()
        found = rows.logsumexp(-1) - rows.gather(1, wanted[start:end, None])[:, 0]
        total += found.double().sum()
    return total


def main_perplexity(
    config: EngineConfig,
    text: Path,
    context: int,
    stride: int | None,
    chunk: int | None,
    most_tokens: int | None,
) -> int:
    """Print the perplexity of a text file; the exit code. Raises `FlexrunError`s."""
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {text}: {error}", hint="--text is a UTF-8 file") from None
    if config.trace is not None:
        check_writable(config.trace)
    tokens = Tokenizer.load(resolve_model(config.model)).encode(words)[:most_tokens]
    found = evaluate(config, tokens, context, stride or context // 2, chunk, progress=True)
    print(f"perplexity {found.perplexity:.4f} of {found.scored} tokens", file=sys.stderr)
    result = {
        "perplexity": found.perplexity,
        "nll": found.nll,
        "tokens": found.scored,
        "context": context,
        "stride": stride or context // 2,
        "seconds": found.seconds,
    }
    print(json.dumps(result), flush=True)
    return 0
