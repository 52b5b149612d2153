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
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(softcap(query · keyᵀ · scaling)) · value over the keys `seen`, without sinks.

    query [..., H, n, D], key [..., K, S, D], value [..., K, S, V], seen [..., n, S] (or broadcast);
    grouped queries share a KV head. Scores and softmax are in float32. Returns the output [..., H,
    n, V], zeros where nothing is seen, and the log of the sum of exponentials [..., H, n], there
    -inf; both float32.
    """
    *batch, heads, rows, dim = query.shape
    kv_heads = key.shape[-3]
    # Query heads of a group become rows of their KV head, so that keys are read once per group.
    grouped = query.reshape(*batch, kv_heads, heads // kv_heads * rows, dim)
    # One buffer of scores, changed in place: it is the largest thing there is.
    scores = _products(grouped, key).mul_(options.scaling)
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_().mul_(options.softcap)
    scores = scores.view(*batch, heads, rows, -1)
    scores.masked_fill_(~seen.unsqueeze(-3), float("-inf"))
    lowest = torch.finfo(scores.dtype).min  # where nothing is seen: zeros, not NaN
    top = scores.amax(-1, keepdim=True).clamp_(min=lowest)
    mass = scores.sub_(top).exp_().sum(-1, keepdim=True)
    grouped = scores.to(value.dtype).view(*batch, kv_heads, heads // kv_heads * rows, -1)
    out = torch.matmul(grouped, value).view(*batch, heads, rows, -1).float()
    out /= mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return out, (top + mass.log()).squeeze(-1)


def _products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """query [..., n, D] · keyᵀ [..., D, S] in float32.

    Where all keys have much in common, as with large biases, differences between scores are small
    against the scores: rounded to 16 bits, they are lost.
    """
    if key.element_size() == 2 and key.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):
        rows, keys = query.flatten(0, -3), key.flatten(0, -3).transpose(1, 2)
        scores = torch.bmm(rows, keys, out_dtype=torch.float32)
        return scores.view(*query.shape[:-1], key.shape[-2])
    return torch.matmul(query.float(), key.float().transpose(-1, -2))
