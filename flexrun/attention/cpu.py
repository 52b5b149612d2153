"""Attention where the CPU computes: Numba over pages for few rows, torch for chunks of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compression.code_vectors import MOST, MULTIPLIES_WORDS
from compression.vectors import LANES, MULTIPLIES_PAIRS, REGISTER
from flexrun.attention.interface import AttentionBackend
from flexrun.attention.team import Job, Team

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexrun.attention.state import Rows
    from flexrun.paused_forward import AttentionOptions
    from offload.kv_layout import KVGroup, PagedSpans
    from offload.paged_kv import KVFormat, PagedKV

SHARE_BYTES = 128 * 1024
"""Least pages of a share, …"""
SHARES = 4
"""… of which there are so many for each thread: one that is held up takes fewer."""


class CpuAttention(AttentionBackend):
    """Reads every page once, in the type that it is stored in; sums are float32."""

    chunk_rows = 16

    def __init__(self, threads: int | None = None) -> None:
        """`threads`: most that attend; as many as torch computes with if not given."""
        self._threads = threads or torch.get_num_threads()
        self._team = Team(self._threads)

    def compile(self, form: KVFormat) -> None:
        """Ahead of time, for queries and pages of `form`: seconds, if that was never done."""
        for stored in {form.dtype, torch.uint8} if form.groups else {form.dtype}:
            self._team.compile(_multiplied(form.dtype, stored), stored)

    def few_rows(
        self, query: torch.Tensor, group: KVGroup, pool: PagedKV, options: AttentionOptions
    ) -> Iterator[tuple[Rows, torch.Tensor, torch.Tensor]]:
        """See `AttentionBackend.few_rows`."""
        if (spans := group.paged(below=self.chunk_rows)) is not None:
            out, lse = self.attend(query.transpose(0, 1), spans, pool, options)
            rows = _rows_of(spans, query.shape[1])
            yield rows, out[rows], lse[rows]

    def attend(
        self,
        query: torch.Tensor,
        spans: PagedSpans,
        pool: PagedKV,
        options: AttentionOptions,
        into: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of `query` [n, H, D] over the pages of `spans`, without sinks.

        Returns the output [n, H, V] and the log of the sum of exponentials [n, H], float32; rows of
        no span are zeros and -inf. With `into` (contiguous) they are made there, and these rows are
        left alone.
        """
        rows, heads, _ = query.shape
        out, lse = into or (
            torch.zeros(rows, heads, pool.value_dim, dtype=torch.float32),
            torch.full((rows, heads), -torch.inf, dtype=torch.float32),
        )
        job = self._job(query, spans, pool, options)
        self._team.run(job, _as_queries(query, pool.raw.dtype), pool.raw, out, lse)
        return out, lse

    def _job(
        self, query: torch.Tensor, spans: PagedSpans, pool: PagedKV, options: AttentionOptions
    ) -> Job:
        """Made once for the layers that are alike: beside other threads Python is slow."""
        (rows, heads, dim), kv_heads = query.shape, pool.kv_heads
        assert dim == pool.key_dim
        heads_of_each = heads // kv_heads
        sizes = kv_heads, heads_of_each, pool.page_tokens, dim, pool.value_dim, *_packing(pool)
        window, chunk = options.sliding_window or 0, options.chunk or 0
        masks = window, chunk, options.softcap or 0.0, options.scaling
        key = "job", sizes, masks, rows, self._threads
        if key not in spans.memo:
            table, pages, indices = _as_arrays(spans)
            worth = len(pages) * pool.page_bytes // SHARE_BYTES
            shares = max(1, min(SHARES * self._threads, len(pages), worth))
            shares = shares if self._threads > 1 else 1
            of_spans = table, pages, indices, rows, spans.most_rows
            spans.memo[key] = Job(sizes, masks, *of_spans, shares)
        job: Job = spans.memo[key]
        return job

    def close(self) -> None:
        """Give back threads."""
        self._team.close()


def _packing(pool: PagedKV) -> tuple[int, int]:
    """Values that share a scale, and whether scales are float16; zeros for plain pages."""
    if (groups := pool.format.groups) is None:
        return 0, 0
    assert groups.bits == 4
    assert pool.page_tokens * groups.most_code * MOST < 2**31  # sums of words over a page
    # Of a key's last codes sixteen bytes are loaded, however few they are: values follow.
    last = -(-(pool.key_dim % groups.group or groups.group) // 2) % LANES or LANES
    assert last + last % 2 + 4 + pool.values[0].numel() >= LANES
    return groups.group, int(groups.numbers == "float16")


def _multiplied(query: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """The type of queries that the kernel multiplies with."""
    as_they_are = {torch.bfloat16: MULTIPLIES_PAIRS, torch.uint8: MULTIPLIES_WORDS}
    if query == torch.bfloat16 and as_they_are.get(stored):
        return query
    return torch.float32


def _as_queries(query: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Of the type and in the order that the kernel multiplies with; query [n, H, D]."""
    kind = _multiplied(query.dtype, stored)
    if stored != torch.bfloat16 or kind == torch.bfloat16:
        return query.to(kind).contiguous()
    whole = query.shape[-1] // (2 * REGISTER) * (2 * REGISTER)
    split = torch.empty(query.shape, dtype=kind)
    pairs = query[..., :whole].unflatten(-1, (-1, REGISTER, 2))
    split[..., :whole] = pairs.transpose(-1, -2).flatten(-3)
    split[..., whole:] = query[..., whole:]
    return split


def _as_arrays(spans: PagedSpans) -> tuple[Any, Any, Any]:
    """[S + 1, 4] first row, rows, first position and first page; pages; their indices."""
    if "arrays" not in spans.memo:
        columns = [spans.first_row, spans.num_rows, spans.first_position, spans.table_start]
        table = np.zeros((len(spans.table_start), 4), np.int64)
        for number, column in enumerate(columns):
            table[: len(column), number] = column.numpy()
        numbers = [t.numpy().astype(np.int64) for t in (spans.pages, spans.indices)]
        spans.memo["arrays"] = (table, *numbers)
    table, pages, indices = spans.memo["arrays"]
    return table, pages, indices


def _rows_of(spans: PagedSpans, rows: int) -> torch.Tensor | slice:
    """Rows of the micro-batch that are in `spans`; a slice if all of them are."""
    if "rows" not in spans.memo:
        table, _, _ = _as_arrays(spans)
        chosen = [np.arange(row, row + count) for row, count in table[:-1, :2]]
        spans.memo["rows"] = torch.from_numpy(np.concatenate(chosen))
    found: torch.Tensor = spans.memo["rows"]
    return slice(None) if len(found) == rows else found
