"""The CPU's kernel over pages in four bits: what attention makes of the expanded pages."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from compression.groupwise import quantize_minmax
from compression.spec import GroupFormat
from flexrun.attention.cpu import CpuAttention
from flexrun.attention.reference import masked_attention, visible
from flexrun.attention.state import AttentionState
from flexrun.paused_forward import AttentionOptions
from offload.kv_layout import KVGroup, build_group
from offload.kv_moves import SpanPages
from offload.paged_kv import KVFormat, PagedKV, TokenSlots
from offload.tiers import Tier

DIMS = [(5, 7), (16, 16), (24, 40), (40, 56), (64, 64), (80, 80), (96, 96), (128, 128)]
DIMS += [(192, 128), (256, 256), (63, 127)]
"""Sizes of keys and values."""
EXACT, ROUNDED = 1e-5, 1e-3
"""Of the largest output: what queries in float32 may differ by, and those in sixteen bits."""


class Shape:
    """What the one layer stores per token."""

    def __init__(self, kv_heads: int, key_dim: int, value_dim: int) -> None:
        self.kv_heads, self.key_dim, self.value_dim = kv_heads, key_dim, value_dim


class Layout:
    """Ragged spans over random pages of several pools, of which unused slots hold NaN."""

    def __init__(
        self, draw: random.Random, shape: Shape, form: KVFormat, pools: int = 1, longest: int = 50
    ) -> None:
        self.draw, self.shape, self.pools = draw, shape, pools
        self.page_tokens = draw.choice([1, 2, 3, 8, 16])
        self.generator = torch.Generator().manual_seed(draw.randrange(2**31))
        self.ends = [draw.randint(1, longest) for _ in range(draw.randint(1, 4))]
        self.counts = [draw.randint(1, min(end, draw.choice([1, 1, 5, 15]))) for end in self.ends]
        tables = [-(-end // self.page_tokens) for end in self.ends]
        # All bits are ones: codes of 15, and numbers that are none.
        size = form.page(shape, self.page_tokens)
        data = torch.full((sum(tables) * size,), 255, dtype=torch.uint8)
        self.pool = PagedKV.of(data, shape, self.page_tokens, form)
        order = draw.sample(range(sum(tables)), sum(tables))
        self.tables = [[order.pop() for _ in range(count)] for count in tables]
        self.homes = [[draw.randrange(pools) for _ in table] for table in self.tables]
        for end, table in zip(self.ends, self.tables):
            at = torch.arange(end)
            slots = TokenSlots(torch.tensor(table)[at // self.page_tokens], at % self.page_tokens)
            cells = (self._cells(end, dim, form) for dim in (shape.key_dim, shape.value_dim))
            self.pool.store(slots, self.pool.pack(*cells))

    def _cells(self, tokens: int, dim: int, form: KVFormat) -> torch.Tensor:
        """Random rows, with different means: centres are not zero."""
        assert form.groups is not None
        values = torch.randn(tokens * self.shape.kv_heads, dim, generator=self.generator)
        values += torch.randn(dim, generator=self.generator)
        return quantize_minmax(values, form.groups).view(tokens, self.shape.kv_heads, -1)

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def query(self, group: int, dtype: torch.dtype) -> torch.Tensor:
        """[n, H, D]"""
        heads = self.shape.kv_heads * group
        shape = self.rows, heads, self.shape.key_dim
        return torch.randn(shape, generator=self.generator).to(dtype)

    def options(self) -> AttentionOptions:
        draw = self.draw
        return AttentionOptions(
            scaling=draw.uniform(0.5, 1.5) * self.shape.key_dim**-0.5,
            sliding_window=draw.choice([None, None, 1, 3, 17]),
            chunk=draw.choice([None, None, None, 4, 7]),
            softcap=draw.choice([None, None, 2.0, 30.0]),
        )

    def group(self, pool: int | None) -> KVGroup:
        """The spans' pages in one pool, or all of them."""
        spans, row = [], 0
        for end, count, table, homes in zip(self.ends, self.counts, self.tables, self.homes):
            places = [i for i, home in enumerate(homes) if pool in (None, home)]
            if places:
                pages, newest = [table[i] for i in places], places[-1] == len(table) - 1
                spans.append(SpanPages(row, end - count, end, pages, places, newest))
            row += count
        device = torch.device("cpu")
        return build_group(spans, self.page_tokens, device, Tier.DEVICE, staged=False)

    def attend(
        self,
        backend: CpuAttention,
        query: torch.Tensor,
        options: AttentionOptions,
        pool: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        spans = self.group(pool).paged()
        if spans is None:
            rows, heads, _ = query.shape
            out = torch.zeros(rows, heads, self.shape.value_dim)
            return out, torch.full((rows, heads), -math.inf)
        return backend.attend(query, spans, self.pool, options)

    def expected(
        self, query: torch.Tensor, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The formula over the expanded pages, which are not rounded."""
        pool = replace(self.pool, format=KVFormat(torch.float32, self.pool.format.groups))
        found, row = [], 0
        for end, count, table in zip(self.ends, self.counts, self.tables):
            keys, values = (t[0, :, :end].double() for t in pool.gather(torch.tensor([table])))
            own = query[row : row + count].transpose(0, 1).double()
            seen = visible(torch.arange(end - count, end)[:, None], torch.arange(end), options)
            out, lse = masked_attention(own, keys, values, seen, options)
            found.append((out.transpose(0, 1), lse.transpose(0, 1)))
            row += count
        out, lse = (torch.cat(each) for each in zip(*found))
        return out.float(), lse.float()


def assert_close(
    found: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    limit: float,
) -> None:
    """Of the largest output, and of the largest log of a sum if it is above 1."""
    (out, lse), (wanted, sums) = found, expected
    assert float((out - wanted).abs().max()) <= limit * float(wanted.abs().max())
    assert float((lse - sums).abs().max()) <= limit * max(1.0, float(sums.abs().max()))


@pytest.fixture(scope="module")
def backend():
    attention = CpuAttention(threads=2)
    yield attention
    attention.close()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dims", DIMS)
def test_against_expanded_pages(backend, dims, group):
    """Output and log-sum-exp of ragged rows under random options, whatever a group's size."""
    draw = random.Random(str((dims, group)))
    for heads in [(1, 1), (3, 3), (1, 8), (2, 7)]:
        numbers = draw.choice(["bfloat16", "float16"])
        form = KVFormat(torch.float32, GroupFormat(4, group, numbers))
        layout = Layout(draw, Shape(heads[0], *dims), form)
        query, options = layout.query(heads[1], torch.float32), layout.options()
        wanted = layout.expected(query, options)
        assert_close(layout.attend(backend, query, options), wanted, EXACT)


@pytest.mark.parametrize("words", [True, False], ids=["as compiled", "without products of words"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", DIMS)
def test_queries_of_sixteen_bits(monkeypatch, backend, dims, dtype, words):
    """Pages that are computed with in sixteen bits: nothing but the query itself is rounded."""
    if not words:
        monkeypatch.setattr("flexrun.attention.cpu.MULTIPLIES_WORDS", False)
    draw = random.Random(str(dims))
    form = KVFormat(dtype, GroupFormat(4, 64))
    for heads in [(3, 3), (1, 5)]:
        layout = Layout(draw, Shape(heads[0], *dims), form, longest=90)
        query, options = layout.query(heads[1], dtype), layout.options()
        wanted = layout.expected(query, options)
        assert_close(layout.attend(backend, query, options), wanted, ROUNDED / 10)


def test_large_sums_cancel(backend):
    """Queries whose values are large and alike: most of a sum over codes is taken off."""
    layout = Layout(random.Random(3), Shape(2, 128, 128), KVFormat(torch.bfloat16, GroupFormat()))
    query = (layout.query(4, torch.float32) + 10.0).bfloat16()
    options = AttentionOptions(scaling=128**-0.5)
    assert_close(layout.attend(backend, query, options), layout.expected(query, options), ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_split_of_the_pages_gives_the_same(monkeypatch, backend, dtype):
    """Pages in one to three pools, merged in any order, in shares that cut spans."""
    monkeypatch.setattr("flexrun.attention.cpu.SHARE_BYTES", 1)
    draw = random.Random(0)
    for _ in range(60):
        dims, pools = draw.choice([(16, 16), (64, 64), (24, 80), (5, 7)]), draw.choice([1, 2, 3])
        form = KVFormat(dtype, GroupFormat(4, 64))
        layout = Layout(draw, Shape(draw.choice([1, 2, 3]), *dims), form, pools)
        query, options = layout.query(draw.choice([1, 2, 3, 5]), dtype), layout.options()
        heads = query.shape[1]
        state = AttentionState(layout.rows, heads, dims[1], torch.device("cpu"))
        for pool in draw.sample(range(pools), pools):
            state.add(slice(None), *layout.attend(backend, query, options, pool))
        merged = state.finish(None, torch.float32)
        out, _ = layout.expected(query, options)
        assert merged.shape == out.shape
        limit = EXACT if dtype == torch.float32 else ROUNDED / 10
        assert float((merged - out).abs().max()) <= limit * float(out.abs().max())


def test_plain_and_packed_pages_of_one_group(backend):
    """Spans remember what was prepared for each kind of pool."""
    layout = Layout(random.Random(1), Shape(2, 64, 64), KVFormat(torch.float32, GroupFormat()))
    query, options = layout.query(3, torch.float32), layout.options()
    spans = layout.group(None).paged()
    assert spans is not None
    pages = torch.arange(len(layout.pool.raw)).unsqueeze(1)
    data = torch.stack(layout.pool.gather(pages), 1).flatten()
    plain = PagedKV.of(data, layout.shape, layout.page_tokens)
    wanted = layout.expected(query, options)
    for pool in (layout.pool, plain, layout.pool):
        assert_close(backend.attend(query, spans, pool, options), wanted, EXACT)
