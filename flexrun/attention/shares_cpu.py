"""Shares of the CPU's attention: a stretch of the list of pages, whatever the pages store.

The flat list of pages of all spans is cut into shares of about equal work, one for each thread; a
span that is cut in two is put together at the end. See `kernel_cpu` for what the letters mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types

from compression import vector_memory as memory
from compression.compiled import kernel, part, pointer_to
from compression.vectors import LANES, F
from flexrun.attention.lanes import BLOCK
from flexrun.attention.softmax_cpu import NONE

_floats, _ints = pointer_to(types.float32), pointer_to(types.int64)


@part
def _lines(count: Any) -> Any:
    """float32 of whole cache lines with room for `count`.

    Vectors that cross from one line to the next are loaded twice, and two threads that write to the
    same line take turns.
    """
    return (count + LANES - 1) // LANES * LANES


def shares_of(attend_page: Any, prepare: Any, room: Any) -> Any:
    """The kernel that attends with these parts.

    attend_page: to one page, for all heads of a span's rows. room(query, sizes, states): how many
    float32 they need for scores, and for what prepare derives from a span's queries.
    """

    @kernel
    def attend_share(
        query: Any, cells: Any, sizes: Any, masks: Any, spans: Any, pages: Any, indices: Any,
        first: Any, last: Any, out: Any, lse: Any, part_span: Any, part_out: Any, part_lse: Any,
    ) -> None:  # fmt: skip
        """Attend to entries `first` to `last` of the list of pages.

        query: [rows * H * D], see `memory.add_products`. cells: the pool, flat. sizes: (K, G, T, D,
        V, values that share a scale, whether scales are float16). masks: (window, chunk, softcap: 0
        for none; scale). spans: [S + 1, 4] first row, rows, first position, start of its pages.
        pages, indices: [entries] page number, and place in the sequence's table. A span whose pages
        are all in the share goes to out [rows * H * V] and lse [rows * H]; a cut one, of which
        there are two at most, to part_out [2, most rows * H * V] and part_lse [2, most rows * H],
        with its number in part_span [2].
        """
        heads, tokens, dim, most = sizes[0] * sizes[1], sizes[2], sizes[4], part_lse.shape[1]
        needed, states = room(query, sizes, most), most + BLOCK
        owner, at = _memory(_lines(needed) + _lines(states * dim) + 2 * _lines(states) + 3 * LANES)
        # Numba counts who uses arrays of its own memory, and each count is a memory barrier.
        lanes, four = carray(_ints(at), (4, BLOCK)), carray(_floats(at + 8 * LANES), BLOCK)
        kept, at = carray(_floats(at + 12 * LANES), needed), at + 12 * LANES + 4 * _lines(needed)
        total, at = carray(_floats(at), states * dim), at + 4 * _lines(states * dim)
        top, mass = carray(_floats(at), states), carray(_floats(at + 4 * _lines(states)), states)
        scores = kept[: BLOCK * tokens + LANES]
        span = np.searchsorted(spans[:, 3], first, side="right") - 1
        half = memory.splits_pairs(cells)
        parts = 0
        while first < last:
            end = min(spans[span + 1, 3], last)
            total[:], top[:], mass[:] = 0, NONE, 0
            prepare(query, sizes, masks, spans[span], four, lanes, kept)
            for entry in range(first, end):
                ahead = pages[min(entry + 1, last - 1)]
                attend_page(
                    query, cells, sizes, masks, spans[span], pages[entry], indices[entry] * tokens,
                    ahead, scores, top, mass, total, four, lanes, kept,
                )  # fmt: skip
            at, count = spans[span, 0] * heads, spans[span, 1] * heads
            if first == spans[span, 3] and end == spans[span + 1, 3]:
                _finish(total, top, mass, count, dim, half, out[at * dim :], lse[at:])
            else:
                _finish(total, top, mass, count, dim, half, part_out[parts], part_lse[parts])
                part_span[parts] = span
                parts += 1
            first, span = end, span + 1
        owner[0] = 0  # it is kept until here

    return attend_share


@part
def _memory(count: Any) -> Any:
    """An array, and the address of `count` float32 in it, where a cache line begins."""
    owner = np.empty(count + LANES, F)
    return owner, np.int64((owner.ctypes.data + 4 * LANES - 1) // (4 * LANES) * (4 * LANES))


@part
def _finish(
    total: Any, top: Any, mass: Any, states: Any, dim: Any, half: Any, out: Any, lse: Any
) -> None:
    """Values of a state are in the order of `load_turned`: see `splits_pairs` for `half`."""
    both = 2 * max(half, 1)
    split = dim // both * both if half > 0 else 0
    for state in range(states):
        seen = mass[state] > 0
        share = F(1.0) / mass[state] if seen else F(0)
        start = state * dim
        for i in range(0, split, both):
            for lane in range(half):
                out[start + i + 2 * lane] = total[start + i + lane] * share
                out[start + i + 2 * lane + 1] = total[start + i + half + lane] * share
        for i in range(start + split, start + dim):
            out[i] = total[i] * share
        lse[state] = top[state] + np.log(mass[state]) if seen else F(-np.inf)
