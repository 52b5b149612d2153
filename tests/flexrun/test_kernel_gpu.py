"""Facts about the Triton kernels: attention over paged keys against a loop over rows in float64."""

from __future__ import annotations

import math

import pytest
import torch

from flexrun.attention import gpu
from flexrun.attention.gpu import paged_attention
from flexrun.paused_forward import AttentionOptions
from offload.kv_layout import PagedSpans
from tests.flexrun.paged_batches import DEVICE, Batch, Result, assert_same, require_triton

require_triton()

DECODES = [(0, 1), (37, 1), (16, 1), (210, 1), (99, 1)]
"""Spans: positions that are there already, and new rows."""
MIXED = [(0, 1), (141, 1), (0, 70), (100, 45), (16, 1), (129, 2), (0, 3), (31, 1)]
PLAIN = AttentionOptions(scaling=0.2)
OPTIONS = {
    "plain": PLAIN,
    "window": AttentionOptions(scaling=0.2, sliding_window=50),
    "narrow window": AttentionOptions(scaling=0.2, sliding_window=1),
    "chunk": AttentionOptions(scaling=0.2, chunk=48),
    "narrow chunk": AttentionOptions(scaling=0.2, chunk=7),
    "softcap": AttentionOptions(scaling=0.5, softcap=1.5),
    "all": AttentionOptions(scaling=0.5, sliding_window=33, chunk=64, softcap=20.0),
}


def merge(first: Result, second: Result) -> Result:
    """Attention over two disjoint sets of keys."""
    top = torch.maximum(first[1], second[1])
    top = torch.where(top == -math.inf, 0.0, top)
    weights = [torch.exp(lse - top) for _, lse in (first, second)]
    total = weights[0] + weights[1]
    parts = (out * w.unsqueeze(-1) for (out, _), w in zip((first, second), weights))
    return sum(parts) / total.clamp(min=1e-30).unsqueeze(-1), top + torch.log(total)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("spans", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_ragged_rows(name, spans):
    """Rows of ragged sequences see their own positions, under every option."""
    Batch(spans).check(OPTIONS[name])


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 17])
def test_grouped_heads(group):
    """Any number of query heads shares a KV head, powers of two or not."""
    for spans in ([(37, 1), (90, 1)], [(40, 1), (30, 9), (0, 23)]):
        Batch(spans, heads=(2 * group, 2)).check(OPTIONS["window"])


@pytest.mark.parametrize(
    "dims", [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (48, 32), (24, 130)]
)
def test_head_sizes(dims):
    """Keys and values have any size, and not the same."""
    for dtype in (torch.float32, torch.bfloat16):
        Batch([(40, 1), (130, 1), (61, 70)], (3, 1), dims, dtype=dtype).check(PLAIN)


@pytest.mark.parametrize("page_tokens", [1, 5, 8, 16, 64])
def test_page_sizes(page_tokens):
    """Pages are smaller or larger than the kernel's tiles of keys, powers of two or not."""
    for name in ("plain", "window"):
        Batch([(141, 1), (100, 45), (129, 2)], page_tokens=page_tokens).check(OPTIONS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_number_types(dtype):
    """Pages of every type, with more rows than one tile has."""
    Batch([(130, 1), (200, 150), (0, 70)], (2, 1), dtype=dtype).check(OPTIONS["window"])


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize(("num_splits", "combined"), [(2, 16), (40, 2)])
def test_pieces(monkeypatch, name, num_splits, combined):
    """Keys that are cut into pieces give the same, also where some pieces are empty."""
    monkeypatch.setattr(gpu, "COMBINED", combined)
    for spans in (DECODES, [(141, 1), (0, 1), (60, 21)], [(100, 40)], [(170, 3), (9, 2)]):
        Batch(spans, heads=(2, 1)).check(OPTIONS[name], num_splits=num_splits)


@pytest.mark.parametrize("name", OPTIONS)
def test_parts_of_the_pages(name):
    """Two disjoint sets of the pages merge to the whole, although each has gaps."""
    for spans, num_splits in ((MIXED, None), (DECODES, 2)):
        batch = Batch(spans, page_tokens=8)
        pages = [(span, index) for span in range(len(spans)) for index in range(30)]
        chosen = {page for page in pages if batch.draw.random() < 0.4}
        first = batch.check(OPTIONS[name], lambda *page, some=chosen: page in some, num_splits)
        second = batch.check(OPTIONS[name], lambda *page, some=chosen: page not in some, num_splits)
        assert_same(merge(first, second), batch.expected(OPTIONS[name]))


def test_runs_of_pages():
    """The newest pages alone, or the oldest, or none of some spans."""
    batch = Batch(MIXED)
    for keep in (
        lambda span, index: index >= 4,
        lambda span, index: index < 4,
        lambda span, index: index == 5,
        lambda span, index: span % 2 == 0,
        lambda span, index: False,
    ):
        for name in ("plain", "window"):
            batch.check(OPTIONS[name], keep)


def test_many_spans():
    """More spans than a program looks through at a time, with chunks at both ends."""
    spans = [(3, 20), *((i % 20, 1) for i in range(130)), (20, 9), (1, 2)]
    Batch(spans, heads=(2, 1)).check(OPTIONS["plain"])


def test_no_rows():
    """Nothing in, nothing out."""
    batch = Batch([(3, 1)])
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    spans = PagedSpans(none, none, none, none.new_zeros(1), none, none, 0, 0)
    query = torch.empty(0, 4, 32, device=DEVICE)
    out, lse = paged_attention(query, batch.pool, spans, PLAIN)
    assert (out.shape, lse.shape) == ((0, 4, 32), (0, 4))
