"""Facts about attention over keys in groups of 4 bits, against a loop over rows in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from compression.spec import GroupFormat
from flexrun.attention import triton_attention
from flexrun.attention.gpu import paged_attention
from flexrun.attention.interface import AttentionBackend
from flexrun.attention.reference import masked_attention, visible
from flexrun.attention.state import AttentionState
from flexrun.attention.torch_ops import TorchAttention
from flexrun.attention.triton_attention import TritonAttention, usable
from flexrun.paused_forward import AttentionOptions
from offload.kv_layout import KVGroup, build_group
from offload.kv_moves import SpanPages
from offload.paged_kv import KVFormat, PagedKV
from offload.tiers import Tier
from tests.flexrun.paged_batches import DEVICE, ON_GPU, Batch, assert_same, require_triton

require_triton()


class AttentionShape(NamedTuple):
    """As the one of `flexrun.model_trace`, whose import brings Triton's compiler with it."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


MIXED = [(0, 1), (75, 1), (0, 20), (16, 1), (39, 2)]
"""Spans: positions that are there already, and new rows."""
PLAIN = AttentionOptions(scaling=0.2)
OPTIONS = {
    "plain": PLAIN,
    "window": AttentionOptions(scaling=0.2, sliding_window=30),
    "all": AttentionOptions(scaling=0.5, sliding_window=23, chunk=40, softcap=20.0),
}


def on_device(batch: Batch) -> tuple[PagedKV, KVGroup]:
    """A batch's pages, and all of its spans."""
    places = zip(batch.first_rows, batch.starts, batch.counts, batch.tables)
    spans = [
        SpanPages(row, start, start + count, table, range(len(table)))
        for row, start, count, table in places
    ]
    raw, size = batch.pool.raw.flatten().to(DEVICE), batch.page_tokens
    group = build_group(spans, size, DEVICE, Tier.DEVICE, staged=False)
    return PagedKV.of(raw, batch.shape, size, batch.format), group


@pytest.mark.parametrize("name", OPTIONS)
def test_ragged_rows(name):
    """Rows of ragged sequences see their own positions, and no slot that holds nothing."""
    Batch(MIXED, groups=GroupFormat(4, 32)).check(OPTIONS[name])


@pytest.mark.parametrize(
    ("group", "dims"),
    [
        (32, (64, 64)),
        (32, (96, 80)),
        (32, (190, 131)),
        (64, (128, 128)),
        (64, (80, 96)),
        (64, (256, 1)),
        (64, (33, 62)),
        (128, (128, 128)),
        (128, (48, 190)),
        (128, (5, 256)),
    ],
)
def test_head_sizes(group, dims):
    """Of any size, odd ones, too, in groups of any size, of which the last may be short."""
    Batch([(40, 1), (3, 20)], (3, 1), dims, groups=GroupFormat(4, group)).check(PLAIN)


@pytest.mark.parametrize("numbers", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_number_types(dtype, numbers):
    """Queries and scales of either type."""
    groups = GroupFormat(4, 64, numbers)
    Batch([(70, 1), (5, 12)], (4, 2), (80, 80), dtype=dtype, groups=groups).check(PLAIN)


@pytest.mark.parametrize("page_tokens", [1, 5, 64])
def test_page_sizes(page_tokens):
    """Pages are smaller or larger than the kernel's tiles of keys, powers of two or not."""
    batch = Batch([(61, 1), (30, 15)], page_tokens=page_tokens, groups=GroupFormat(4, 64))
    batch.check(OPTIONS["window"])


@pytest.mark.parametrize("count", [1, 3, 17])
def test_grouped_heads(count):
    """Any number of query heads shares a KV head."""
    Batch([(37, 1), (20, 5)], (2 * count, 2), groups=GroupFormat(4, 64)).check(PLAIN)


@pytest.mark.parametrize("num_splits", [2, 40])
def test_pieces(num_splits):
    """Keys that are cut into pieces give the same, also where some pieces are empty."""
    for spans in ([(71, 1), (0, 1)], [(50, 11)]):
        batch = Batch(spans, (2, 1), (80, 40), groups=GroupFormat(4, 64))
        batch.check(OPTIONS["all"], num_splits=num_splits)


def test_parts_of_the_pages():
    """Pages that are missing, and spans that have none."""
    batch = Batch(MIXED, page_tokens=8, groups=GroupFormat(4, 64))
    for keep in (
        lambda span, index: (span + index) % 3 != 0,
        lambda span, index: index >= 4,
        lambda span, index: False,
    ):
        batch.check(OPTIONS["window"], keep)


def test_gathered_pages_give_the_same():
    """What the pool itself expands, with plain operations."""
    batch = Batch([(37, 1), (90, 6)], (4, 2), (80, 48), groups=GroupFormat(4, 32))
    found = batch.run(PLAIN)
    for span, table in enumerate(batch.tables):
        end = batch.starts[span] + batch.counts[span]
        keys, values = (t[0, :, :end] for t in batch.pool.gather(torch.tensor([table])))
        rows = slice(batch.first_rows[span], batch.first_rows[span] + batch.counts[span])
        places = torch.arange(end)
        seen = visible(places[batch.starts[span] :].unsqueeze(1), places, PLAIN)
        out, lse = masked_attention(batch.query[:, rows], keys, values, seen, PLAIN)
        expected = out.transpose(0, 1), lse.T
        assert_same((found[0][rows], found[1][rows]), expected, batch.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_backends_give_the_same(dtype):
    """Torch's operations and the kernel, for single rows of several sequences."""
    batch = Batch([(29, 1), (50, 1)], (4, 2), (80, 48), 8, dtype, GroupFormat(4, 64))
    pool, group = on_device(batch)
    for packed in (pool.keys, pool.values):  # gathered are whole pages, which hold no NaN elsewhere
        packed[packed[..., -1] == 255] = 0
    results = []
    backends: tuple[AttentionBackend, ...] = TorchAttention(), TritonAttention()
    for backend in backends:
        backend.prepare([group])
        state = AttentionState(batch.query.shape[1], 4, 48, DEVICE)
        for part in backend.few_rows(batch.query.to(DEVICE), group, pool, PLAIN):
            state.add(*part)
        results.append(state.finish(None, torch.float32)[batch.first_rows])
    error = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*results, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_passes_its_own_check(dtype):
    """With groups that are whole, and with short ones."""
    shapes: Any = {AttentionShape(4, 2, 64, 64), AttentionShape(3, 1, 48, 40)}
    assert usable(shapes, dtype, 16, DEVICE, KVFormat(dtype, GroupFormat(4, 64)))


@pytest.mark.parametrize("wrong", ["plain", "packed"])
def test_both_kinds_of_pages_are_checked(monkeypatch, wrong):
    """A kernel that is wrong for one of them is not used for either."""

    def kernel(query, pool, *rest):
        out, lse = paged_attention(query, pool, *rest)
        return out + float((pool.format.groups is None) == (wrong == "plain")), lse

    form = KVFormat(torch.float32, GroupFormat(4, 64))
    monkeypatch.setattr(triton_attention, "paged_attention", kernel)
    shapes: Any = {AttentionShape(2, 1, 32, 32)}
    assert not usable(shapes, torch.float32, 8, DEVICE, form)
    plain = usable(shapes, torch.float32, 8, DEVICE)
    assert plain == (wrong == "packed")


@pytest.mark.gpu
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_head_sizes(dim, group, dtype):
    """Every head size and type fits into the GPU's registers and shared memory."""
    assert ON_GPU
    for heads in ((9, 3), (16, 2), (20, 1)):
        groups = GroupFormat(4, group, "float16" if dtype == torch.float16 else "bfloat16")
        batch = Batch([(400, 1), (0, 90), (31, 1)], heads, (dim, dim), dtype=dtype, groups=groups)
        for num_splits in (None, 3):
            batch.check(PLAIN, num_splits=num_splits)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # it is a prototype, it says
def test_gpu_is_not_waited_for():
    """Neither by the kernel's launch, nor where it has several pieces to merge."""
    groups = GroupFormat(4, 64)
    batch = Batch([(300, 1), (40, 30)], (8, 2), (128, 128), dtype=torch.bfloat16, groups=groups)
    pool, group = on_device(batch)
    spans, query = group.paged(), batch.query.to(DEVICE).transpose(0, 1)
    assert spans is not None
    for num_splits in (None, 2):
        expected = paged_attention(query, pool, spans, PLAIN, num_splits=num_splits)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = paged_attention(query, pool, spans, PLAIN, num_splits=num_splits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found[0], expected[0])
