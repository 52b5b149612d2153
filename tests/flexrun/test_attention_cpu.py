"""The CPU's kernel: exact in every storage type, and the same however the pages are split."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compression import crew
from flexrun.attention.cpu import CpuAttention
from flexrun.attention.state import AttentionState
from flexrun.attention.team import Job
from flexrun.paused_forward import AttentionOptions
from offload.kv_layout import KVGroup, build_group
from offload.kv_moves import SpanPages
from offload.paged_kv import PagedKV, TokenSlots
from offload.tiers import Tier

DIMS = [(5, 7), (16, 16), (24, 16), (32, 32), (40, 56), (64, 64), (80, 80), (128, 128)]
DIMS += [(192, 128), (256, 256)]
"""Sizes of keys and values."""
ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


class Shape:
    """What the one layer stores per token."""

    def __init__(self, kv_heads: int, key_dim: int, value_dim: int) -> None:
        self.kv_heads, self.key_dim, self.value_dim = kv_heads, key_dim, value_dim


class Layout:
    """Ragged spans over random pages of several pools, and their keys and values in order."""

    def __init__(
        self, draw: random.Random, shape: Shape, dtype: torch.dtype, pools: int, longest: int
    ) -> None:
        self.page_tokens = draw.choice([1, 2, 3, 8, 16])
        self.shape = shape
        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        self.ends = [draw.randint(1, longest) for _ in range(draw.randint(1, 4))]
        self.counts = [draw.randint(1, min(end, draw.choice([1, 1, 5, 15]))) for end in self.ends]
        tables = [-(-end // self.page_tokens) for end in self.ends]
        # Slots without a token hold what may not be read.
        size = shape.kv_heads * (shape.key_dim + shape.value_dim) * self.page_tokens
        total = sum(tables)
        self.whole = PagedKV.of(
            torch.full((total * size,), math.nan, dtype=dtype), shape, self.page_tokens
        )
        order = draw.sample(range(total), total)
        self.tables = [[order.pop() for _ in range(count)] for count in tables]
        self.keys, self.values = [], []
        for end, table in zip(self.ends, self.tables):
            key, value = (
                torch.randn(end, shape.kv_heads, dim, generator=generator).to(dtype)
                for dim in (shape.key_dim, shape.value_dim)
            )
            at = torch.arange(end)
            pages = torch.tensor(table)[at // self.page_tokens]
            slots = TokenSlots(pages, at % self.page_tokens)
            self.whole.store(slots, self.whole.pack(key, value))
            self.keys.append(key)
            self.values.append(value)
        self.homes = [[draw.randrange(pools) for _ in table] for table in self.tables]
        self.pools = pools

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def group(self, pool: int | None) -> KVGroup | None:
        """The spans' pages in one pool, or all of them."""
        spans, row = [], 0
        for end, count, table, homes in zip(self.ends, self.counts, self.tables, self.homes):
            places = [i for i, home in enumerate(homes) if pool in (None, home)]
            if places:
                pages = [table[i] for i in places]
                newest = places[-1] == len(table) - 1
                spans.append(SpanPages(row, end - count, end, pages, places, newest))
            row += count
        if not spans:
            return None
        device = torch.device("cpu")
        return build_group(spans, self.page_tokens, device, Tier.DEVICE, staged=False)

    def attend(
        self,
        backend: CpuAttention,
        query: torch.Tensor,
        options: AttentionOptions,
        pool: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = self.group(pool)
        if group is None:
            rows, heads = query.shape[1], query.shape[0]
            lse = torch.full((rows, heads), -math.inf)
            return torch.zeros(rows, heads, self.shape.value_dim), lse
        spans = group.paged()
        assert spans is not None
        return backend.attend(query.transpose(0, 1), spans, self.whole, options)

    def expected(
        self, query: torch.Tensor, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The formula in float64, row by row and head by head."""
        out, sums, row = [], [], 0
        for end, count, keys, values in zip(self.ends, self.counts, self.keys, self.values):
            for position in range(end - count, end):
                seen = [k for k in range(position + 1) if sees(position, k, options)]
                heads = query.shape[0]
                kv = [head * keys.shape[1] // heads for head in range(heads)]
                scores = torch.einsum(
                    "hd,shd->hs", query[:, row].double(), keys[seen][:, kv].double()
                )
                scores *= options.scaling
                if options.softcap is not None:
                    scores = options.softcap * torch.tanh(scores / options.softcap)
                sums.append(torch.logsumexp(scores, 1))
                weights = torch.softmax(scores, 1)
                out.append(torch.einsum("hs,shv->hv", weights, values[seen][:, kv].double()))
                row += 1
        return torch.stack(out), torch.stack(sums)


def sees(position: int, key: int, options: AttentionOptions) -> bool:
    near = options.sliding_window is None or position - key < options.sliding_window
    return near and (options.chunk is None or position // options.chunk == key // options.chunk)


def random_options(draw: random.Random, dim: int) -> AttentionOptions:
    return AttentionOptions(
        scaling=draw.uniform(0.5, 1.5) * dim**-0.5,
        sliding_window=draw.choice([None, None, 1, 3, 17]),
        chunk=draw.choice([None, None, None, 4, 7]),
        softcap=draw.choice([None, None, 2.0, 30.0]),
    )


def random_query(draw: random.Random, heads: int, layout: Layout, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    return torch.randn(heads, layout.rows, dim, generator=generator)


@pytest.fixture(scope="module")
def backend():
    attention = CpuAttention(threads=2)
    yield attention
    attention.close()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, of the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (9, 3), (8, 1), (14, 2)])
def test_against_float64(backend, dtype, dims, heads):
    """Output and log-sum-exp of ragged rows, under random options.

    The same limit for pages of sixteen bits: the formula has the same rounded keys and values.
    """
    draw = random.Random(str((dims, heads)))
    for _ in range(2):
        layout = Layout(draw, Shape(heads[1], *dims), dtype, pools=1, longest=50)
        query = random_query(draw, heads[0], layout, dims[0]).to(dtype)
        options = random_options(draw, dims[0])
        out, lse = layout.attend(backend, query, options, None)
        expected, sums = layout.expected(query, options)
        assert relative(out, expected) <= 1e-5
        assert float((lse - sums).abs().max()) <= 1e-5 * max(1.0, float(sums.abs().max()))


@pytest.mark.parametrize("pairs", [True, False], ids=["as compiled", "without products of pairs"])
@pytest.mark.parametrize("dims", [(16, 16), (24, 40), (32, 32), (80, 80), (192, 128)])
def test_queries_of_either_type(monkeypatch, backend, dims, pairs):
    """Pages in bfloat16: queries in float32 are not rounded, those in bfloat16 do as well."""
    if not pairs:
        monkeypatch.setattr("flexrun.attention.cpu.MULTIPLIES_PAIRS", False)
    draw = random.Random(str(dims))
    layout = Layout(draw, Shape(2, *dims), torch.bfloat16, 1, longest=60)
    options = AttentionOptions(scaling=dims[0] ** -0.5)
    query = random_query(draw, 6, layout, dims[0])
    rounded = query.bfloat16()
    assert (query - rounded).abs().max() > 1e-3
    for each in (query, rounded, rounded.float()):
        out, lse = layout.attend(backend, each, options, None)
        in_order = each.transpose(0, 1).contiguous().transpose(0, 1)  # as they arrive on HOST
        same, same_lse = layout.attend(backend, in_order, options, None)
        assert torch.equal(out, same)
        assert torch.equal(lse, same_lse)
        expected, sums = layout.expected(each, options)
        assert relative(out, expected) <= 1e-5
        assert float((lse - sums).abs().max()) <= 1e-5 * max(1.0, float(sums.abs().max()))


@pytest.mark.parametrize("layouts", [800, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_split_of_the_pages_gives_the_same(backend, layouts):
    """Random layouts: pages in one to three pools, merged in any order."""
    draw = random.Random(0)
    worst = 0.0
    for number in range(layouts):
        kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 5])
        dims = draw.choice([(16, 16), (32, 32), (24, 16), (5, 7)])
        layout = Layout(draw, Shape(kv_heads, *dims), torch.float32, draw.choice([1, 2, 3]), 40)
        options = random_options(draw, dims[0])
        query = random_query(draw, kv_heads * group, layout, dims[0])
        out, lse = layout.attend(backend, query, options, None)
        state = AttentionState(layout.rows, kv_heads * group, dims[1], torch.device("cpu"))
        for pool in draw.sample(range(layout.pools), layout.pools):
            rows = slice(None) if draw.random() < 0.5 else torch.arange(layout.rows)
            state.add(rows, *layout.attend(backend, query, options, pool))
        merged = state.finish(None, torch.float32)
        worst = max(worst, relative(merged, out.double()))
        assert worst <= 1e-6, f"layout {number}"
        if number % 50 == 0:
            expected, sums = layout.expected(query, options)
            assert relative(merged, expected) <= 1e-5
            assert float((lse - sums).abs().max()) <= 1e-5 * max(1.0, float(sums.abs().max()))


@pytest.mark.parametrize("openmp", [True, False], ids=["torch's threads", "a pool"])
@pytest.mark.parametrize("threads", [2, 3])
def test_shares_are_put_together(monkeypatch, openmp, threads):
    """Many small shares, cut in the middle of sequences, give what one share gives."""
    if not openmp:
        monkeypatch.setattr(crew, "start_of_openmp", lambda: None)
    monkeypatch.setattr("flexrun.attention.cpu.SHARE_BYTES", 1)
    draw = random.Random(threads)
    one, many = CpuAttention(threads=1), CpuAttention(threads=threads)
    for _ in range(20):
        layout = Layout(draw, Shape(2, 32, 32), torch.bfloat16, pools=1, longest=200)
        query = random_query(draw, 6, layout, 32)
        options = random_options(draw, 32)
        out, lse = layout.attend(many, query, options, None)
        expected, sums = layout.attend(one, query, options, None)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse, sums, rtol=1e-5, atol=2e-6)
    one.close()
    many.close()


def test_what_is_prepared_once_serves_all_layers(monkeypatch):
    """Calls with the same pages differ in pools, queries and memory for their results."""
    monkeypatch.setattr("flexrun.attention.cpu.SHARE_BYTES", 1)
    draw = random.Random(11)
    layout = Layout(draw, Shape(2, 32, 32), torch.float32, pools=1, longest=200)
    group, options = layout.group(None), random_options(draw, 32)
    assert group is not None
    spans = group.paged()
    assert spans is not None
    many, one = CpuAttention(threads=3), CpuAttention(threads=1)
    other = torch.randn(layout.whole.raw.shape, generator=torch.Generator().manual_seed(1))
    layers = [layout.whole, PagedKV.of(other.view(-1), layout.shape, layout.page_tokens)]
    for pool in (*layers, *layers):
        query = random_query(draw, 6, layout, 32)
        into = torch.full((layout.rows, 6, 32), torch.nan), torch.full((layout.rows, 6), torch.nan)
        out, lse = many.attend(query.transpose(0, 1), spans, pool, options, into)
        fresh = layout.group(None)
        assert fresh is not None
        again = fresh.paged()
        assert again is not None
        expected, sums = one.attend(query.transpose(0, 1), again, pool, options)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse, sums, rtol=1e-5, atol=2e-6)
    one.attend(query.transpose(0, 1), spans, pool, options)
    jobs = [each for each in spans.memo.values() if isinstance(each, Job)]
    assert [job.shares > 1 for job in jobs] == [True, False]  # one for each number of threads
    one.close()
    many.close()


def test_sinks_take_their_share(backend):
    """A sink's logit counts once, whatever the number of parts."""
    draw = random.Random(5)
    layout = Layout(draw, Shape(2, 16, 16), torch.float32, pools=3, longest=40)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    options = AttentionOptions(scaling=0.3, sinks=sinks)
    query = random_query(draw, 4, layout, 16)
    state = AttentionState(layout.rows, 4, 16, torch.device("cpu"))
    for pool in range(3):
        state.add(slice(None), *layout.attend(backend, query, options, pool))
    expected, sums = layout.expected(query, replace(options, sinks=None))
    share = torch.sigmoid(sums - sinks.double())
    found = state.finish(sinks, torch.float32)
    assert relative(found, expected * share.unsqueeze(-1)) <= 1e-5


CHILD = """
import json, torch
from compression import crew
from flexrun.attention.cpu import CpuAttention
from flexrun.attention.team import Job
from flexrun.attention.prefill import attend_chunk
from flexrun.attention.state import AttentionState
from flexrun.paused_forward import AttentionOptions
from offload.kv_layout import Chunk
from offload.paged_kv import PagedKV

class Shape:
    kv_heads, key_dim, value_dim = 3, 64, 64

def memory(field):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[field].split()[0]) * 1024

def attend(start, rows, options, dtype):
    count = start // 32
    pool = PagedKV.of(torch.randn(max(1, count) * 32 * 3 * 128).to(dtype), Shape, 32)
    query, key, value = (torch.randn(h, rows, 64).to(dtype) for h in (9, 3, 3))
    pages = torch.arange(count)
    chunk = Chunk(slice(0, rows), start, pages, pages, pages.tolist(), start, True)
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    state = AttentionState(rows, 9, 64, torch.device("cpu"))
    attend_chunk(state, query, key, value, chunk, pool, options)
    state.finish(None, dtype)
    return memory("VmHWM") - before

with torch.inference_mode():
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, options in {
            "plain": AttentionOptions(0.125),
            "window": AttentionOptions(0.125, sliding_window=512),
            "softcap": AttentionOptions(0.125, softcap=30.0),
        }.items():
            attend(32, 40, options, dtype)  # what is loaded on first use is not counted
            found[f"{dtype} {name} prompt"] = attend(0, 4096, options, dtype)
            found[f"{dtype} {name} chunk"] = attend(3072, 1024, options, dtype)
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory peak")
def test_prefill_needs_little_memory():
    """A prompt of 4 096 tokens and nine heads takes 40 MB besides what it is given."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found.values()) <= 40 * 10**6, found
