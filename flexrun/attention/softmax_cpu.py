"""The online softmax of the CPU's kernels: scores of one page become weights, and tops are raised.

What is known so far of a state is its largest score, the sum of exponentials and the weighted
values, all in float32 (FlashAttention-2, algorithm 1). Scores and weights are flat [T, 4].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compression import vector_memory as memory
from compression import vectors as v
from compression.compiled import part
from compression.vectors import LANES, F
from flexrun.attention import vector_sums as sums
from flexrun.attention.lanes import BLOCK, hide

NONE = F(-1e30)
"""The score of what is not seen: below any score, and differences of it are numbers."""


@part
def cap(scores: Any, low: Any, high: Any, softcap: Any) -> None:
    """softcap * tanh(score / softcap)"""
    scale, one = v.splat(F(2.0) / softcap), v.splat(F(1.0))
    for i in range(BLOCK * low, BLOCK * high, LANES):
        e = v.exp(v.smaller(v.mul(memory.load(scores, i), scale), v.splat(F(80.0))))
        tanh = v.sub(one, v.div(v.splat(F(2.0)), v.add(e, one)))
        memory.store(scores, i, v.mul(tanh, v.splat(softcap)))


@part
def _raise_tops(four: Any, states: Any, top: Any, mass: Any, total: Any, dim: Any) -> None:
    """Bring what is known so far in line with the larger scores in `four`."""
    for lane in range(BLOCK):
        state = states[lane]
        if four[lane] > top[state]:  # which is rare once some pages were seen
            scale = F(np.exp(top[state] - four[lane]))
            top[state] = four[lane]
            mass[state] *= scale
            for i in range(state * dim, (state + 1) * dim):
                total[i] *= scale
        four[lane] = top[state]


@part
def _fill(scores: Any, end: Any, value: Any) -> None:
    """The last vector of scores may reach beyond them."""
    memory.store(scores, end, v.splat(value))


@part
def weigh(
    scores: Any, low: Any, high: Any, lows: Any, highs: Any, masked: Any,
    states: Any, top: Any, mass: Any, total: Any, dim: Any, four: Any,
) -> None:  # fmt: skip
    """Turn scores into weights, exp(score - top), and add them up."""
    first, last = BLOCK * low, BLOCK * high
    if masked:
        hide(scores, low, high, lows, highs, NONE)
    _fill(scores, last, NONE)
    highest = memory.load(scores, first)
    for i in range(first + LANES, last, LANES):
        highest = v.larger(highest, memory.load(scores, i))
    sums.store_folded_max(four, 0, highest)
    _raise_tops(four, states, top, mass, total, dim)
    tops, added = sums.load_repeated(four, 0), v.splat(F(0))
    for i in range(first, last, LANES):
        memory.store(scores, i, v.exp(v.sub(memory.load(scores, i), tops)))
    if masked:
        hide(scores, low, high, lows, highs, F(0))
    _fill(scores, last, F(0))
    for i in range(first, last, LANES):
        added = v.add(added, memory.load(scores, i))
    sums.store_folded_sum(four, 0, added)
    for lane in range(BLOCK):
        mass[states[lane]] += four[lane]
