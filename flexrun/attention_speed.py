"""How fast the processor attends to pages: alone, and while the device computes."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from flexrun.paused_forward import AttentionOptions
from offload.kv_hosted import hosted_rows
from offload.kv_moves import SpanPages

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexrun.attention.cpu import CpuAttention
    from flexrun.model_trace import AttentionShape
    from offload.paged_kv import PagedKV

MEASURED_BYTES = 256 << 20
"""Far more than caches hold: of twice as much a part still comes from there."""
_ROWS = 16
_REPEATS = 3
_WHILE_SECONDS = 0.4


class AttentionSpeed(NamedTuple):
    """What `measured_speed` finds."""

    bytes_per_second: float
    """Of pages, when nothing else runs."""
    contention: float
    """Part of their speed that attention and compute lose when both run; the mean of both."""


def measured_speed(
    attention: CpuAttention,
    pool: PagedKV,
    shape: AttentionShape,
    compute: Callable[[], object] | None = None,
    seconds: float = _WHILE_SECONDS,
) -> AttentionSpeed:
    """Attend to `pool`, whose pages were all written, in layers of `shape`.

    `compute` is a short piece of what the device does meanwhile, None if it has memory of its own:
    it runs for `seconds` alone, and as long beside attention.
    """
    nbytes, attend = attention_call(attention, pool, shape)
    attend()  # the first one compiles, or loads what was compiled
    alone = statistics.median(_seconds(attend) for _ in range(_REPEATS))
    if compute is None:
        return AttentionSpeed(nbytes / alone, 0.0)
    compute()
    computed = statistics.median(_for_a_while(compute, seconds))
    beside, slower = _beside(attend, compute, seconds)
    contention = 1 - (alone / beside + computed / slower) / 2
    return AttentionSpeed(nbytes / alone, max(0.0, contention))


def attention_call(
    attention: CpuAttention, pool: PagedKV, shape: AttentionShape
) -> tuple[int, Callable[[], object]]:
    """Bytes of the pages of `pool`, at most `MEASURED_BYTES`, and a call that attends to them."""
    page_tokens, page_bytes = pool.page_tokens, pool.page_bytes
    pages = min(len(pool.raw), max(1, MEASURED_BYTES // page_bytes))
    numbers = [range(pages)[row::_ROWS] for row in range(min(_ROWS, pages))]
    spans = [
        SpanPages(row, len(mine) * page_tokens - 1, len(mine) * page_tokens, mine, range(len(mine)))
        for row, mine in enumerate(numbers)
    ]
    hosted = hosted_rows(spans, page_tokens, torch.device("cpu"))
    assert hosted is not None
    table = hosted.group.paged()
    assert table is not None
    query = torch.ones(len(spans), shape.query_heads, shape.key_dim, dtype=pool.format.dtype)
    options = AttentionOptions(scaling=shape.key_dim**-0.5)
    return pages * page_bytes, partial(attention.attend, query, table, pool, options)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _for_a_while(call: Callable[[], object], seconds: float) -> list[float]:
    start, taken = time.perf_counter(), [_seconds(call)]
    while time.perf_counter() - start < seconds:
        taken.append(_seconds(call))
    return taken


def _beside(
    attend: Callable[[], object], compute: Callable[[], object], seconds: float
) -> tuple[float, float]:
    """Seconds of both calls, each again and again in a thread of its own."""
    over = threading.Event()
    attended: list[float] = []

    def keep_attending() -> None:
        with torch.inference_mode():
            while not over.is_set() or not attended:
                attended.append(_seconds(attend))

    with ThreadPoolExecutor(1, "flexrun measuring attention") as thread:
        attending = thread.submit(keep_attending)
        try:
            computed = _for_a_while(compute, seconds)
        finally:
            over.set()
    attending.result()  # raises what went wrong there
    return statistics.median(attended), statistics.median(computed)
