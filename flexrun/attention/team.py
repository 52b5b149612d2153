"""Attention calls as jobs for a crew of threads: tables of numbers and addresses."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import carray, types

from compression import (
    code_vectors,
    compiled,
    number_bits,
    vector_memory,
    vectors,
    word_vectors,
)
from compression.compiled import (
    Callbacks,
    cached_kernel,
    callback,
    compiled_from,
    count_up,
    kernel,
    pointer_to,
    stamp_of,
)
from compression.crew import Crew
from flexrun.attention.kernel_cpu import attend_plain
from flexrun.attention.packed_cpu import attend_packed

if TYPE_CHECKING:
    from collections.abc import Sequence

_floats, _ints = pointer_to(types.float32), pointer_to(types.int64)
_uint16s, _int16s = pointer_to(types.uint16), pointer_to(types.int16)
_bytes = pointer_to(types.uint8)
_FINISHED, _JOB = 25, 28
"""Place of the number of shares that are done in a job, a table of int64: next share, shares, K, G,
T, D, V, window, chunk, spans, entries, most states of a span, rows, cells; eleven addresses; this;
of packed pages the values that share a scale, and whether scales are float16. How many that are.
"""


_CELLS, _QUERY, _OUT, _LSE, _PARTS, _NUM_CELLS = 14, 16, 17, 18, 22, 13
"""Places of what differs from layer to layer."""


class Job:
    """What a call of the kernel is about; the arrays and numbers are those of `attend_share`.

    It can be run again and again, by one thread at a time, with other queries and pools.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        masks: tuple[int, int, float, float],
        spans: Any,
        pages: Any,
        indices: Any,
        rows: int,
        most_rows: int,
        shares: int,
    ) -> None:
        """`sizes`: seven, the last two 0 for plain pages; `most_rows`: of one span."""
        self.spans, self.shares = spans, shares
        self.heads, self.value_dim = sizes[0] * sizes[1], sizes[4]
        self.states = most_rows * self.heads
        """Of one part."""
        numbers = len(spans) - 1, len(pages), self.states, rows
        counts = [0, shares, *sizes[:5], *masks[:2], *numbers, 0]
        factors = np.array(masks[2:], np.float32)
        self._kept = [factors, spans, pages, indices]  # the table has addresses only
        first, *others = (each.ctypes.data for each in self._kept)
        places = 0, first, 0, 0, 0, *others, 0, 0, 0
        self.table = np.array([*counts, *places, 0, *sizes[5:]], np.int64)
        self.address = ctypes.cast(self.table.ctypes.data, ctypes.POINTER(ctypes.c_int64))

    def point_to(
        self,
        query: torch.Tensor,
        cells: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        parts: Sequence[Any],
    ) -> None:
        """Say where everything is; `parts` are arrays like those of `_merge_parts`."""
        table = self.table
        table[0] = table[_FINISHED] = 0
        table[_PARTS : _PARTS + len(parts)] = [each.ctypes.data for each in parts]
        table[_CELLS], table[_NUM_CELLS] = cells.data_ptr(), cells.numel()
        table[_QUERY], table[_OUT], table[_LSE] = (each.data_ptr() for each in (query, out, lse))


def _taking(attend_share: Any) -> Any:
    """The kernel that takes shares, each for `attend_share`."""

    @kernel
    def take_shares(job: Any, queries: Any, pool: Any) -> None:
        """Shares of `job`, a table of numbers and addresses, until none is left.

        queries, pool: two of the addresses, as pointers to what is there.
        """
        shares, entries, states, rows = job[1], job[10], job[11], job[12]
        sizes = (job[2], job[3], job[4], job[5], job[6], job[26], job[27])
        heads = sizes[0] * sizes[1]
        factors = carray(_floats(job[15]), 2)
        masks = job[7], job[8], factors[0], factors[1]
        query = carray(queries, rows * heads * sizes[3])
        cells = carray(pool, job[13])
        out = carray(_floats(job[17]), rows * heads * sizes[4])
        lse = carray(_floats(job[18]), rows * heads)
        spans = carray(_ints(job[19]), (job[9] + 1, 4))
        pages, indices = carray(_ints(job[20]), entries), carray(_ints(job[21]), entries)
        part_span = carray(_ints(job[22]), (shares, 2))
        part_out = carray(_floats(job[23]), (shares, 2, states * sizes[4]))
        part_lse = carray(_floats(job[24]), (shares, 2, states))
        while True:
            number = count_up(job, 0)
            if number >= shares:
                return
            first, last = entries * number // shares, entries * (number + 1) // shares
            attend_share(
                query, cells, sizes, masks, spans, pages, indices, first, last, out, lse,
                part_span[number], part_out[number], part_lse[number],
            )  # fmt: skip
            count_up(job, _FINISHED)

    return take_shares


_take_plain, _take_packed = _taking(attend_plain), _taking(attend_packed)


@cached_kernel
def _merge_parts(
    spans: Any, heads: Any, dim: Any, part_span: Any, part_out: Any, part_lse: Any, out: Any,
    lse: Any,
) -> None:  # fmt: skip
    """Put spans together that were cut: part_span [parts], -1 for none, others like in shares."""
    before = -1
    for number in range(part_span.shape[0]):
        span = part_span[number]
        if span < 0:
            continue
        first, states = spans[span, 0] * heads, spans[span, 1] * heads
        if span != before:  # all parts of a span follow each other
            out[first * dim : (first + states) * dim] = 0
            lse[first : first + states] = -np.inf
            before = span
        for state in range(states):
            new, old = part_lse[number, state], lse[first + state]
            if new == -np.inf:
                continue
            high = max(old, new)
            a, b = np.exp(old - high), np.exp(new - high)
            lse[first + state] = high + np.log(a + b)
            for i in range(dim):
                at = (first + state) * dim + i
                out[at] = (out[at] * a + part_out[number, state * dim + i] * b) / (a + b)


def _on_bfloat16(stamp: int) -> Any:
    @callback
    def on_bfloat16(data: Any) -> None:
        compiled_from(stamp)
        job = carray(data, _JOB)
        _take_plain(job, _floats(job[16]), _uint16s(job[14]))

    return on_bfloat16


def _on_pairs(stamp: int) -> Any:
    @callback
    def on_pairs(data: Any) -> None:
        compiled_from(stamp)
        job = carray(data, _JOB)
        _take_plain(job, _uint16s(job[16]), _uint16s(job[14]))

    return on_pairs


def _on_float16(stamp: int) -> Any:
    @callback
    def on_float16(data: Any) -> None:
        compiled_from(stamp)
        job = carray(data, _JOB)
        _take_plain(job, _floats(job[16]), _int16s(job[14]))

    return on_float16


def _on_float32(stamp: int) -> Any:
    @callback
    def on_float32(data: Any) -> None:
        compiled_from(stamp)
        job = carray(data, _JOB)
        _take_plain(job, _floats(job[16]), _floats(job[14]))

    return on_float32


def _on_packed(stamp: int) -> Any:
    @callback
    def on_packed(data: Any) -> None:
        compiled_from(stamp)
        job = carray(data, _JOB)
        _take_packed(job, _floats(job[16]), _bytes(job[14]))

    return on_packed


def _on_packed_words(stamp: int) -> Any:
    @callback
    def on_packed_words(data: Any) -> None:
        compiled_from(stamp)
        job = carray(data, _JOB)
        _take_packed(job, _uint16s(job[16]), _bytes(job[14]))

    return on_packed_words


_CALLED = compiled, vectors, vector_memory, code_vectors, word_vectors, number_bits
_CALLBACKS = Callbacks(
    {
        (torch.float32, torch.bfloat16): _on_bfloat16,
        (torch.bfloat16, torch.bfloat16): _on_pairs,
        (torch.float32, torch.float16): _on_float16,
        (torch.float32, torch.float32): _on_float32,
        (torch.float32, torch.uint8): _on_packed,
        (torch.bfloat16, torch.uint8): _on_packed_words,
    },
    stamp_of(Path(__file__).parent, *_CALLED),
)
"""By the types of queries and cells; nobody asks for what the processor cannot multiply."""


class Team:
    """Threads that take the shares of a job."""

    def __init__(self, threads: int) -> None:
        self._crew = Crew(threads)
        self._scratch = np.empty(0, np.float32)
        """For the parts of spans that are cut."""

    @staticmethod
    def compile(query: torch.dtype, cells: torch.dtype) -> None:
        """What `run` needs for such types, or what was compiled before is loaded."""
        _CALLBACKS[query, cells]

    def run(
        self,
        job: Job,
        query: torch.Tensor,
        cells: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Attend with `query` to pages in `cells`; out and lse (float32) of rows in spans are set.

        All are contiguous. Raises `MemoryError`.
        """
        spans = np.full(2 * job.shares, -1, np.int64)
        states = len(spans) * job.states
        split, end = states * job.value_dim, states * (job.value_dim + 1)
        if end > len(self._scratch):
            self._scratch = np.empty(end, np.float32)
        parts = self._scratch[:split], self._scratch[split:end]
        job.point_to(query, cells, out, lse, [spans, *parts])
        self._crew.run(_CALLBACKS[query.dtype, cells.dtype], job.address, job.shares)
        if job.table[_FINISHED] != job.shares:  # compiled code cannot raise through OpenMP
            raise MemoryError("attention ran out of memory for its sums")
        if job.shares > 1:
            into = out.view(-1).numpy(), lse.view(-1).numpy()
            shaped = (each.reshape(len(spans), -1) for each in parts)
            _merge_parts(job.spans, job.heads, job.value_dim, spans, *shaped, *into)

    def close(self) -> None:
        """Give back threads."""
        self._crew.close()
