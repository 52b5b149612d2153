"""Attention on a GPU: the Triton kernel over pages for few rows, torch's flash for long chunks."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

import torch

from compression.expansion import quantize_unchecked
from flexrun.attention.gpu import paged_attention, triton_available
from flexrun.attention.interface import AttentionBackend
from flexrun.attention.reference import masked_attention, visible
from flexrun.paused_forward import AttentionOptions
from offload.kv_layout import build_group
from offload.kv_moves import SpanPages
from offload.paged_kv import KVFormat, PagedKV
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
    shapes: set[AttentionShape],
    dtype: torch.dtype,
    page_tokens: int,
    device: torch.device,
    form: KVFormat | None = None,
) -> bool:
    """Whether the kernels run on this device, and give what plain operations give.

    Every shape of layer is tried once, on random pages: a kernel that a driver or a version of
    Triton miscompiles must not go unnoticed. Says why not in a warning. If pages have the `form` of
    few bits, plain ones are tried, too: new tokens are in such.
    """
    if not triton_available():
        return False
    forms = [KVFormat(dtype)]
    if form is not None and form.groups is not None:
        forms.append(form)
    for shape, tried in itertools.product(sorted(shapes, key=str), forms):
        try:
            error = _largest_error(shape, tried, page_tokens, device)
        except Exception as failure:  # whatever a compiler may raise
            logger.warning("the Triton attention kernel does not run here: %s", failure)
            return False
        if not error <= TOLERANCE[dtype]:  # nor if it is not a number
            logger.warning("the Triton attention kernel is off by %.2g here: not used", error)
            return False
    return True


def _random_pool(
    shape: AttentionShape, form: KVFormat, page_tokens: int, own: torch.Generator
) -> PagedKV:
    """Seven pages."""
    size = 7 * form.page(shape, page_tokens)
    pool = PagedKV.of(
        torch.empty(size, dtype=form.cells, device=own.device), shape, page_tokens, form
    )
    for side, dim in ((pool.keys, pool.key_dim), (pool.values, pool.value_dim)):
        made = torch.randn(*side.shape[:3], dim, generator=own, device=own.device)
        if form.groups is not None:
            made = quantize_unchecked(made.view(-1, dim), form.groups).view(side.shape)
        side.copy_(made)
    return pool


def _largest_error(
    shape: AttentionShape, form: KVFormat, page_tokens: int, device: torch.device
) -> float:
    own = torch.Generator(device).manual_seed(0)
    pool = _random_pool(shape, form, page_tokens, own)
    ends, rows = (2 * page_tokens + 1, 4 * page_tokens - 1), (1, 5)
    spans = [
        SpanPages(0, ends[0] - rows[0], ends[0], [5, 0, 3], [0, 1, 2]),
        SpanPages(1, ends[1] - rows[1], ends[1], [6, 2, 1, 4], [0, 1, 2, 3]),
    ]
    table = build_group(spans, page_tokens, device, Tier.DEVICE, staged=False).paged()
    assert table is not None
    query = torch.randn(sum(rows), shape.query_heads, shape.key_dim, generator=own, device=device)
    query = query.to(form.dtype)
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
