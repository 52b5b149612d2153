"""The definition of attention that every kernel is tested against: plain torch, one formula.

Legend: H = query heads, K = KV heads, n = query rows, S = positions, D = head size. B = sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from flexrun.paused_forward import AttentionOptions


def visible(
    query_positions: torch.Tensor, key_positions: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """Which keys each query sees (bool, positions broadcast): causal, window and chunk."""
    seen = key_positions <= query_positions
    if options.sliding_window is not None:
        seen &= key_positions > query_positions - options.sliding_window
    if options.chunk is not None:
        seen &= key_positions // options.chunk == query_positions // options.chunk
    return seen


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """softmax(softcap(query · keyᵀ · scaling)) · value over the keys that are `seen`.

    query [..., H, n, D], key [..., K, S, D], value [..., K, S, V], seen [..., n, S] (or broadcast);
    grouped queries share a KV head. The softmax is in float32. Returns [..., H, n, V].
    """
    *batch, heads, rows, dim = query.shape
    kv_heads = key.shape[-3]
    # Query heads of a group become rows of their KV head, so that keys are read once per group.
    grouped = query.reshape(*batch, kv_heads, heads // kv_heads * rows, dim)
    scores = torch.matmul(grouped, key.transpose(-1, -2)).float() * options.scaling
    scores = scores.view(*batch, heads, rows, -1)
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.masked_fill(~seen.unsqueeze(-3), float("-inf"))
    if options.sinks is None:
        probabilities = torch.softmax(scores, -1)
    else:
        sinks = options.sinks.float().view(heads, 1, 1).expand(*batch, heads, rows, 1)
        probabilities = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    grouped = probabilities.to(value.dtype).view(*batch, kv_heads, heads // kv_heads * rows, -1)
    return torch.matmul(grouped, value).view(*batch, heads, rows, -1)
