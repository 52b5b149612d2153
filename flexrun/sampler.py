"""From logits to tokens: greedy, temperature, min_p, top_k and top_p, each row on its own.

A row's token depends on its logits, its parameters and its one random number, never on the rows
beside it. To make that exact on every device, probabilities become 40-bit integers before they are
summed: integer sums do not depend on the order in which a kernel adds, float sums do.

Order as in vLLM: temperature, then min_p, top_k, top_p (on what top_k left). Tokens as likely as
the last one kept are kept too.

Shapes: R = rows, V = vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from flexrun.request import SamplingParams

_SCALE = 2.0**40  # weight of the likeliest token; 2**22 of them still fit in an int64
_CHUNK = 1 << 20  # logits drawn from at a time: bounds the workspace to about 50 MiB
_UINT64 = (1 << 64) - 1


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    randoms: Sequence[float],
    banned: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Choose a token for each row of `logits` (R, V); -1 where the largest logit is not finite.

    `randoms` has a number in [0, 1) per row (unused by greedy rows), `banned` the token ids a row
    may not choose. Nothing here waits for the device.
    """
    if any(banned):
        logits = _without(logits, banned)
    tokens = logits.argmax(dim=-1)  # a NaN counts as the largest
    best = logits.gather(1, tokens[:, None])[:, 0]
    rows_per_chunk = max(1, _CHUNK // logits.shape[1])
    for truncated in (False, True):
        rows = [i for i, p in enumerate(params) if not p.greedy and _is_truncated(p) == truncated]
        for start in range(0, len(rows), rows_per_chunk):
            chunk = rows[start : start + rows_per_chunk]
            where = _on(logits, chunk, torch.int64)
            chosen = [params[i] for i in chunk]
            tokens[where] = _draw(logits[where], chosen, [randoms[i] for i in chunk], truncated)
    return tokens.masked_fill(~best.isfinite(), -1)


def uniform(seed: int, sample_index: int, position: int) -> float:
    """The random number in [0, 1) of one token: a pure function, so any schedule draws the same."""
    key = np.array([seed & _UINT64, sample_index], dtype=np.uint64)
    bits = int(np.random.Philox(key=key, counter=position).random_raw())
    return (bits >> 11) * 2.0**-53


def request_seed(params: SamplingParams, engine_seed: int, index: int) -> int:
    """The seed of a request: its own, or one derived from the engine's and its place in the job."""
    if params.seed is not None:
        return params.seed
    # The sample index of a real completion never reaches 2**64 - 1, so these streams are apart.
    key = np.array([engine_seed & _UINT64, _UINT64], dtype=np.uint64)
    return int(np.random.Philox(key=key, counter=index).random_raw())


def _is_truncated(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _on(like: Tensor, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)


def _without(logits: Tensor, banned: Sequence[Sequence[int]]) -> Tensor:
    vocab = logits.shape[1]
    pairs = [(r, t) for r, ids in enumerate(banned) for t in ids if t < vocab]
    where = _on(logits, [r * vocab + t for r, t in pairs], torch.int64)
    logits = logits.clone(memory_format=torch.contiguous_format)
    logits.view(-1).index_fill_(0, where, -math.inf)
    return logits


def _draw(
    logits_RV: Tensor, params: list[SamplingParams], randoms: list[float], truncated: bool
) -> Tensor:
    """Sample every row by inverting its cumulative distribution at its random number.

    `logits_RV` is the caller's own copy: it is overwritten, to save passes over the memory.
    """
    # Beyond these bounds float32 would turn 0 / temperature or -inf / temperature into NaN.
    temperature = _on(logits_RV, [max(p.temperature, 1e-30) for p in params], torch.float32)
    x_RV = logits_RV.float()
    x_RV = x_RV.sub_(x_RV.amax(dim=1, keepdim=True)).div_(temperature[:, None])
    if any(p.min_p > 0 for p in params):
        min_p = _on(x_RV, [p.min_p for p in params], torch.float32)
        x_RV.masked_fill_(x_RV.exp() < min_p[:, None], -math.inf)
    if truncated:
        x_RV = _truncate(x_RV, params)
    cumulative_RV = _weights(x_RV).cumsum(dim=1)
    total = cumulative_RV[:, -1]
    target = (_on(x_RV, randoms, torch.float64) * total).long().minimum(total - 1)
    token = torch.searchsorted(cumulative_RV, target[:, None], right=True)[:, 0]
    return token.clamp_(max=x_RV.shape[1] - 1)  # a row of NaNs finds none; its result is not used


def _weights(x: Tensor) -> Tensor:
    """Integer probabilities, unnormalised; `x` is at most 0."""
    return x.exp().mul_(_SCALE).long()


def _truncate(x_RV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Set what top_k and top_p drop to -inf."""
    vocab = x_RV.shape[1]
    top_k = [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]
    top_p = _on(x_RV, [p.top_p for p in params], torch.float64)[:, None]
    # Values only, likeliest first. How many columns are taken depends on the other rows, but the
    # threshold found below does not: it lies within the row's own top_k.
    if max(top_k) * 4 < vocab:
        ordered_RK = x_RV.topk(max(top_k), dim=1).values
    else:
        ordered_RK = x_RV.sort(dim=1, descending=True).values
    kth = ordered_RK.gather(1, _on(x_RV, top_k, torch.int64)[:, None] - 1)
    total = _weights(x_RV.masked_fill(x_RV < kth, -math.inf)).sum(dim=1, keepdim=True)
    weights_RK = _weights(ordered_RK)
    likelier_RK = weights_RK.cumsum(dim=1) - weights_RK
    keep_RK = (likelier_RK < top_p * total) & (ordered_RK >= kth)
    threshold = ordered_RK.masked_fill(~keep_RK, math.inf).amin(dim=1, keepdim=True)
    return x_RV.masked_fill_(x_RV < threshold, -math.inf)
