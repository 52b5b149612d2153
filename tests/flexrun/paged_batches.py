"""Sequences in paged pools that attention kernels are tested on, and what the kernels must give.

Without a GPU kernels run in Triton's interpreter, with one they run on it: it is the same tests.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from compression import groupwise
from compression.spec import GroupFormat
from flexrun.attention.gpu import paged_attention, triton_available
from flexrun.paused_forward import AttentionOptions
from offload.kv_layout import PagedSpans
from offload.paged_kv import KVFormat, PagedKV

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def require_triton() -> None:
    """Skip the test module that calls this where its kernels cannot run."""
    if not triton_available():
        pytest.skip("Triton is not installed", allow_module_level=True)
    if not ON_GPU:
        # Triton reads this while it is imported, and that happens at the first kernel's launch.
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton was imported before as a compiler", allow_module_level=True)
        os.environ["TRITON_INTERPRET"] = "1"


class Shape:
    """What one layer stores per token."""

    def __init__(self, kv_heads: int, key_dim: int, value_dim: int) -> None:
        self.kv_heads, self.key_dim, self.value_dim = kv_heads, key_dim, value_dim


Keep = Callable[[int, int], bool]
"""Whether page `index` of span `span` is given."""
Result = tuple[torch.Tensor, torch.Tensor]


def all_pages(span: int, index: int) -> bool:
    return True


def make_spans(columns: dict[str, Any], most_rows: int, most_pages: int) -> PagedSpans:
    """Spans on the device, of lists or tensors of integers."""
    tensors: dict[str, Any] = {
        name: torch.as_tensor(column).to(DEVICE, torch.int32) for name, column in columns.items()
    }
    return PagedSpans(**tensors, most_rows=most_rows, most_pages=most_pages)


class Batch:
    """Spans of random sequences in one pool. What is no token's slot holds NaN.

    With `groups`, pages hold keys and values in that format, which the expected result knows of.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        heads: tuple[int, int] = (4, 2),
        dims: tuple[int, int] = (32, 32),
        page_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        groups: GroupFormat | None = None,
    ) -> None:
        self.heads, self.page_tokens, self.dtype = heads[0], page_tokens, dtype
        self.format = KVFormat(dtype, groups)
        self.starts = [start for start, _ in spans]
        self.counts = [rows for _, rows in spans]
        self.draw = random.Random(len(spans) + heads[0])
        self.make = torch.Generator().manual_seed(self.draw.randrange(99))
        lengths = [-(-(start + rows) // page_tokens) for start, rows in spans]
        numbers = self.draw.sample(range(sum(lengths) + 3), sum(lengths))
        self.tables = [[numbers.pop() for _ in range(length)] for length in lengths]
        self.shape = Shape(heads[1], *dims)
        size = self.format.page_bytes(self.shape, page_tokens) * (sum(lengths) + 3)
        nothing = torch.full((size,), 255, dtype=torch.uint8)  # every type takes it for NaN
        self.pool = PagedKV.of(
            nothing.view(self.format.cells), self.shape, page_tokens, self.format
        )
        ends = [start + rows for start, rows in spans]
        self.tokens = [self.fill(end, table) for end, table in zip(ends, self.tables)]
        # Rows come in another order than spans, and some are in no span.
        row, self.first_rows = 1, [0] * len(spans)
        for span in self.draw.sample(range(len(spans)), len(spans)):
            self.first_rows[span] = row
            row += self.counts[span] + self.draw.randrange(2)
        self.query = torch.randn(heads[0], row, dims[0], generator=self.make).to(dtype)

    def fill(self, tokens: int, table: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Random keys and values of one sequence, written into its pages."""
        pair = []
        dims = self.shape.key_dim, self.shape.value_dim
        for target, dim in zip((self.pool.keys, self.pool.values), dims):
            shape = tokens, self.shape.kv_heads, dim
            made = cells = torch.randn(shape, generator=self.make).to(self.dtype)
            if (groups := self.format.groups) is not None:
                packed = groupwise.quantize_minmax(made.view(-1, dim), groups)
                kind = self.dtype if ON_GPU else torch.float32  # the interpreter does not round
                made = groupwise.expand(packed, groups, dim, kind).view(shape)
                cells = packed.view(*shape[:2], -1)
            for position in range(tokens):
                page, offset = divmod(position, self.page_tokens)
                target[table[page], :, offset] = cells[position]
            pair.append(made.double())
        return pair[0], pair[1]

    def run(
        self,
        options: AttentionOptions,
        keep: Keep = all_pages,
        num_splits: int | None = None,
    ) -> Result:
        """What the kernels make of the pages that `keep` is true of."""
        kept = [
            [(page, index) for index, page in enumerate(table) if keep(span, index)]
            for span, table in enumerate(self.tables)
        ]
        ends = [sum(map(len, kept[:span])) for span in range(len(kept) + 1)]
        pairs = [pair for table in kept for pair in table]
        columns = {
            "first_row": self.first_rows,
            "num_rows": self.counts,
            "first_position": self.starts,
            "table_start": ends,
            "pages": [page for page, _ in pairs],
            "indices": [index for _, index in pairs],
        }
        spans = make_spans(columns, max(self.counts), max(map(len, kept)))
        raw = self.pool.raw.flatten().to(DEVICE)
        pool = PagedKV.of(raw, self.shape, self.page_tokens, self.format)
        query = self.query.to(DEVICE).transpose(0, 1)
        out, lse = paged_attention(query, pool, spans, options, num_splits=num_splits)
        assert out.dtype == lse.dtype == torch.float32
        return out.cpu(), lse.cpu()

    def expected(self, options: AttentionOptions, keep: Keep = all_pages) -> Result:
        """The same by its definition, row by row."""
        heads, rows, _ = self.query.shape
        out = torch.zeros(rows, heads, self.shape.value_dim, dtype=torch.float64)
        lse = torch.full((rows, heads), -math.inf, dtype=torch.float64)
        for span, (start, count) in enumerate(zip(self.starts, self.counts)):
            keys, values = (
                t.repeat_interleave(heads // self.shape.kv_heads, 1) for t in self.tokens[span]
            )
            for position in range(start, start + count):
                seen = [
                    key
                    for key in range(position + 1)
                    if (options.sliding_window is None or key > position - options.sliding_window)
                    and (options.chunk is None or key // options.chunk == position // options.chunk)
                    and keep(span, key // self.page_tokens)
                ]
                if not seen:
                    continue
                row = self.first_rows[span] + position - start
                scores = (keys[seen] * self.query[:, row].double()).sum(-1) * options.scaling
                if options.softcap is not None:
                    scores = torch.tanh(scores / options.softcap) * options.softcap
                lse[row] = torch.logsumexp(scores, 0)
                weights = torch.softmax(scores, 0).unsqueeze(-1)
                out[row] = (weights * values[seen]).sum(0)
        return out, lse

    def check(
        self, options: AttentionOptions, keep: Keep = all_pages, num_splits: int | None = None
    ) -> Result:
        """The kernels' result is the expected one."""
        result = self.run(options, keep, num_splits)
        assert_same(result, self.expected(options, keep), self.dtype)
        return result


def assert_same(result: Result, expected: Result, dtype: torch.dtype = torch.float32) -> None:
    # A GPU rounds the weights to the pages' type, the interpreter does not.
    error = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-5) if ON_GPU else 1e-5
    out, lse = expected
    torch.testing.assert_close(result[0].double(), out.double(), rtol=error, atol=error)
    torch.testing.assert_close(result[1].double(), lse.double(), rtol=2e-5, atol=2e-5)
