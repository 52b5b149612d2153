"""Which queries the CPU's kernel serves together, and what each of them sees of a page.

Four at a time: query heads of one KV head, rows of one span, so that a key or value is loaded once
for four. A state is a row of the span and a query head: row * H + head.
"""

from __future__ import annotations

from typing import Any

from compression.compiled import part

BLOCK = 4
"""Queries that are served together."""


@part
def _visible(position: Any, start: Any, tokens: Any, window: Any, chunk: Any) -> Any:
    """First and last (exclusive) slot that a row at `position` sees of the page at `start`."""
    low = 0
    if window:
        low = max(low, position - window + 1 - start)
    if chunk:
        low = max(low, position // chunk * chunk - start)
    high = max(0, min(position + 1 - start, tokens))
    return min(low, high), high


@part
def choose(
    block: Any, k: Any, span: Any, sizes: Any, start: Any, masks: Any, spare: Any, lanes: Any
) -> Any:
    """The four query vectors from `block` on, of KV head `k`, and what they see of a page.

    Fills lanes [4, 4]: where the query starts, its state, first and last slot that it sees. Those
    beyond the span's last one repeat it, and their states are to be thrown away. Returns first and
    last slot that any of them sees, and whether some see less.
    """
    kv_heads, group, tokens, dim = sizes[:4]
    window, chunk = masks[0], masks[1]
    r, g = block // group, block % group
    low, high = tokens, 0
    for lane in range(BLOCK):
        state = (r * kv_heads + k) * group + g
        lanes[0, lane] = (span[0] * kv_heads * group + state) * dim
        lanes[1, lane] = state if block + lane < span[1] * group else spare + lane
        first, last = _visible(span[2] + r, start, tokens, window, chunk)
        lanes[2, lane], lanes[3, lane] = first, last
        if first < last:
            low, high = min(low, first), max(high, last)
        if block + lane + 1 < span[1] * group:
            g += 1
            if g == group:
                r, g = r + 1, 0
    masked = False
    for lane in range(BLOCK):
        masked |= lanes[2, lane] != low or lanes[3, lane] != high
    return low, high, masked


@part
def hide(scores: Any, low: Any, high: Any, lows: Any, highs: Any, value: Any) -> None:
    """Put `value` where a lane does not see what another one of the block does."""
    for lane in range(BLOCK):
        for t in range(low, lows[lane]):
            scores[BLOCK * t + lane] = value
        for t in range(max(highs[lane], low), high):
            scores[BLOCK * t + lane] = value
