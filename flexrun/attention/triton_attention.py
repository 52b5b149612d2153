"""Attention on a GPU: the Triton kernel over pages for few rows, torch's flash for long chunks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from flexrun.attention.gpu import paged_attention, triton_available
from flexrun.attention.interface import AttentionBackend
from flexrun.attention.reference import masked_attention, visible
from flexrun.paused_forward import AttentionOptions
from offload.kv_layout import build_group
from offload.kv_moves import SpanPages
from offload.paged_kv import PagedKV
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexrun.attention.state import Rows
    from flexrun.model_trace import AttentionShape
    from offload.kv_layout import KVGroup

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Of results around 1: a GPU may multiply float32 with the precision of TF32."""


class TritonAttention(AttentionBackend):
    """Reads every page once, where it lies on the device."""

    chunk_rows = 64

    def few_rows(
        self, query: torch.Tensor, group: KVGroup, pool: PagedKV, options: AttentionOptions
    ) -> Iterator[tuple[Rows, torch.Tensor, torch.Tensor]]:
        """See `AttentionBackend.few_rows`."""
        if (spans := group.paged(below=self.chunk_rows)) is not None:
            # Rows of no span have zeros and -inf there, which merge into nothing.
            yield slice(None), *paged_attention(query.transpose(0, 1), pool, spans, options)


def usable(
    shapes: set[AttentionShape], dtype: torch.dtype, page_tokens: int, device: torch.device
) -> bool:
    """Whether the kernel runs on this device, and gives what plain operations give.

    Every shape of layer is tried once, on random pages: a kernel that a driver or a version of
    Triton miscompiles must not go unnoticed. Says why not in a warning.
    """
    if not triton_available():
        return False
    for shape in sorted(shapes, key=str):
        try:
            error = _largest_error(shape, dtype, page_tokens, device)
        except Exception as failure:  # whatever a compiler may raise
            logger.warning("the Triton attention kernel does not run here: %s", failure)
            return False
        if not error <= TOLERANCE[dtype]:  # nor if it is not a number
            logger.warning("the Triton attention kernel is off by %.2g here: not used", error)
            return False
    return True


def _largest_error(
    shape: AttentionShape, dtype: torch.dtype, page_tokens: int, device: torch.device
) -> float:
    own = torch.Generator(device).manual_seed(0)
    sizes = (shape.kv_heads, page_tokens)
    width = shape.kv_heads * page_tokens * (shape.key_dim + shape.value_dim)
    data = torch.randn(7 * width, generator=own, device=device).to(dtype)
    pool = PagedKV.of(data, shape, page_tokens)
    assert pool.keys.shape[1:3] == sizes
    ends, rows = (2 * page_tokens + 1, 4 * page_tokens - 1), (1, 5)
    spans = [
        SpanPages(0, ends[0] - rows[0], ends[0], [5, 0, 3], [0, 1, 2]),
        SpanPages(1, ends[1] - rows[1], ends[1], [6, 2, 1, 4], [0, 1, 2, 3]),
    ]
    table = build_group(spans, page_tokens, device, Tier.DEVICE, staged=False).paged()
    assert table is not None
    query = torch.randn(sum(rows), shape.query_heads, shape.key_dim, generator=own, device=device)
    query = query.to(dtype)
    options = AttentionOptions(scaling=shape.key_dim**-0.5, sliding_window=page_tokens + 2)
    found, _ = paged_attention(query, pool, table, options)
    errors = []
    for span in spans:
        pages = torch.tensor([list(span.pages)], device=device)
        keys, values = (side[0].float() for side in pool.gather(pages))
        places = torch.arange(keys.shape[1], device=device)
        mine = slice(span.row, span.row + span.count)
        at = torch.arange(span.start, span.end, device=device).unsqueeze(1)
        seen = visible(at, places, options)
        wanted, _ = masked_attention(
            query[mine].float().transpose(0, 1), keys, values, seen, options
        )
        errors.append((found[mine] - wanted.transpose(0, 1)).abs().max())
    return float(torch.stack(errors).max())
