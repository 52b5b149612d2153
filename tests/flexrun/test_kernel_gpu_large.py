"""Facts about the Triton kernels on a GPU, at the sizes of real models, against float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch

from flexrun.attention.gpu import paged_attention
from flexrun.attention.reference import visible
from flexrun.paused_forward import AttentionOptions
from offload.paged_kv import PagedKV
from tests.flexrun.paged_batches import (
    DEVICE,
    Result,
    Shape,
    assert_same,
    make_spans,
    require_triton,
)

require_triton()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # it is a prototype, it says
]


class LargeBatch:
    """Spans of random sequences on the GPU, at the sizes of real models."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        heads: tuple[int, int] = (32, 8),
        dim: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        page_tokens: int = 16,
        spare_pages: int = 0,
    ) -> None:
        torch.manual_seed(0)
        self.list, self.page_tokens = spans, page_tokens
        lengths = [-(-(start + rows) // page_tokens) for start, rows in spans]
        pages = spare_pages + torch.randperm(sum(lengths), device=DEVICE)
        self.tables = pages.split(lengths)
        shape = Shape(heads[1], dim, dim)
        size = (spare_pages + sum(lengths)) * 2 * page_tokens * heads[1] * dim
        self.pool = PagedKV.of(torch.empty(size, dtype=dtype, device=DEVICE), shape, page_tokens)
        self.pool.raw[spare_pages:].normal_()
        counts = [rows for _, rows in spans]
        ends = [0, *accumulate(lengths)]
        firsts = [0, *accumulate(counts)][:-1]
        indices = torch.cat([torch.arange(length) for length in lengths])
        columns = {
            "first_row": firsts,
            "num_rows": counts,
            "first_position": [start for start, _ in spans],
            "table_start": ends,
            "pages": pages,
            "indices": indices,
        }
        self.spans = make_spans(columns, max(counts), max(lengths))
        self.query = torch.randn(heads[0], sum(counts), dim, device=DEVICE, dtype=dtype)

    def check(self, options: AttentionOptions, num_splits: int | None = None) -> None:
        """Against float32 on the GPU, span by span."""
        query = self.query.transpose(0, 1)
        paged_attention(query, self.pool, self.spans, options)  # compiles, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            out, lse = paged_attention(query, self.pool, self.spans, options, num_splits=num_splits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        row = 0
        for (start, count), table in zip(self.list, self.tables):
            here = slice(row, row + count)
            keys, values = (t[0, :, : start + count] for t in self.pool.gather(table[None]))
            expected = masked_float32(self.query[:, here], keys, values, start, options)
            assert_same((out[here], lse[here]), expected, self.query.dtype)
            row += count


def masked_float32(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, o: AttentionOptions
) -> Result:
    """query [H, n, D] at positions from `start` on, keys [K, S, D]: out [n, H, V], lse [n, H]."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (t.float().repeat_interleave(group, 0) for t in (keys, values))
    scores = query.float() @ keys.transpose(1, 2) * o.scaling
    if o.softcap is not None:
        scores = torch.tanh(scores / o.softcap) * o.softcap
    positions = torch.arange(keys.shape[1], device=keys.device)
    seen = visible(positions[start:].unsqueeze(1), positions, o)
    scores = scores.masked_fill(~seen, -math.inf)
    out = torch.softmax(scores, -1) @ values
    return out.transpose(0, 1), torch.logsumexp(scores, -1).transpose(0, 1)


LARGE = {
    "plain": AttentionOptions(scaling=0.09),
    "window": AttentionOptions(scaling=0.09, sliding_window=700),
    "softcap": AttentionOptions(scaling=0.09, softcap=20.0),
    "chunk": AttentionOptions(scaling=0.09, chunk=512),
}
LONG_DECODES = [(64 * i + 5, 1) for i in range(64)]
LONG_MIXED = [(0, 1000), *LONG_DECODES[:20], (3000, 300), (777, 77), (0, 2)]


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("spans", [LONG_DECODES, LONG_MIXED], ids=["decodes", "mixed"])
def test_gpu_options(name, spans):
    """Real sizes, in bfloat16, under every option; and nothing waits for the GPU."""
    LargeBatch(spans).check(LARGE[name])


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_head_sizes(dim, dtype):
    """Every head size and type fits into the GPU's registers and shared memory."""
    for heads in ((9, 3), (16, 2), (40, 1)):
        LargeBatch([(2500, 1), (0, 700), (1200, 5), (31, 1)], heads, dim, dtype).check(
            LARGE["plain"]
        )


@pytest.mark.parametrize("num_splits", [1, 2, 7, 50])
def test_gpu_pieces(num_splits):
    """Any number of pieces gives the same, for single rows and for chunks."""
    for spans in ([(8000, 1), (20, 1)], [(6000, 40)], LONG_MIXED):
        LargeBatch(spans).check(LARGE["plain"], num_splits)


def test_gpu_pool_of_more_than_2_31_numbers():
    """Pages behind the reach of 32 bits are found."""
    spare = 2**31 // (2 * 16 * 8 * 128) + 1
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free GPU memory")
    for spans in ([(600, 1), (90, 1)], [(500, 200)]):
        LargeBatch(spans, spare_pages=spare).check(LARGE["plain"])


def test_gpu_graph():
    """A call can be captured into a CUDA graph and replayed with other numbers in the pages."""
    batch = LargeBatch(LONG_MIXED)
    query = batch.query.transpose(0, 1)
    paged_attention(query, batch.pool, batch.spans, LARGE["plain"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = paged_attention(query, batch.pool, batch.spans, LARGE["plain"])
    batch.pool.raw.normal_()
    graph.replay()
    expected = paged_attention(query, batch.pool, batch.spans, LARGE["plain"])
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
