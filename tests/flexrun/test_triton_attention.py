"""The backend around the Triton kernel: used where it gives what plain operations give."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from flexrun.attention import triton_attention
from flexrun.attention.interface import AttentionBackend
from flexrun.attention.torch_ops import TorchAttention
from flexrun.attention.triton_attention import TritonAttention, usable
from flexrun.model_trace import AttentionShape
from flexrun.paused_forward import AttentionOptions
from offload.kv_layout import build_group
from offload.kv_moves import SpanPages
from offload.paged_kv import KVFormat, PagedKV
from offload.tiers import Tier
from tests.flexrun.paged_batches import DEVICE, require_triton

CPU = torch.device("cpu")
SHAPE = AttentionShape(4, 2, 32, 32)


@pytest.fixture
def triton() -> None:
    """The kernel can run, if only in Triton's interpreter."""
    require_triton()


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_passes_its_own_check(dtype: torch.dtype) -> None:
    shapes = {SHAPE, AttentionShape(8, 8, 64, 64), AttentionShape(3, 1, 48, 32)}
    assert usable(shapes, dtype, 16, DEVICE)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("window", [None, 9])
def test_it_gives_what_torch_gives(window: int | None) -> None:
    """Single rows, few and many rows of prompts, in one micro-batch."""
    torch.manual_seed(0)
    pool = PagedKV.of(torch.randn(40 * KVFormat(torch.float32).page(SHAPE, 8)), SHAPE, 8)
    spans, row = [], 0
    for first, end, rows in ((0, 1, 1), (2, 30, 1), (10, 41, 7), (20, 90, 70)):
        count = -(-end // 8)
        spans.append(SpanPages(row, end - rows, end, range(first, first + count), range(count)))
        row += rows
    query = torch.randn(4, row, 32)
    key, value = torch.empty(2, row, 32), torch.empty(2, row, 32)
    for span in spans:
        for side, table in ((key, pool.keys), (value, pool.values)):
            content = table[list(span.pages)].transpose(1, 2).flatten(0, 1)  # [tokens, heads, dim]
            mine = slice(span.row, span.row + span.count)
            side[:, mine] = content[span.start : span.end].transpose(0, 1)
    options = AttentionOptions(scaling=0.2, sliding_window=window)
    results = []
    backends: tuple[AttentionBackend, ...] = TorchAttention(), TritonAttention()
    for backend in backends:
        group = build_group(spans, 8, CPU, Tier.DEVICE, staged=False)
        backend.prepare([group])
        state = backend.parts(query, key, value, [(group, pool)], options)
        results.append(state.finish(None, query.dtype))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_without_triton_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "triton_available", lambda: False)
    assert not usable({SHAPE}, torch.float32, 16, CPU)


@pytest.mark.parametrize("broken", ["raises", "wrong", "nan"])
def test_a_kernel_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def kernel(query: torch.Tensor, pool: PagedKV, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if broken == "raises":
            raise RuntimeError("no such instruction")
        value = 1.0 if broken == "wrong" else float("nan")
        out = torch.full((*query.shape[:2], pool.values.shape[-1]), value)
        return out, out[..., 0]

    monkeypatch.setattr(triton_attention, "triton_available", lambda: True)
    monkeypatch.setattr(triton_attention, "paged_attention", kernel)
    with caplog.at_level(logging.WARNING):
        assert not usable({SHAPE}, torch.float32, 16, CPU)
    assert "Triton attention kernel" in caplog.text
