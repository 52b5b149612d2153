"""Runs the shares of an attention call on the very threads that torch computes with.

After each of its own operations torch's OpenMP threads spin for milliseconds, waiting for the next;
threads of ours would share the cores with them and take twice as long. So the shares are given to
that team, by the entry point that compilers use for OpenMP regions. Where torch has no such
library, threads of a pool take them.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from flexrun.attention.kernel_cpu import attend_share
from flexrun.attention.vector_memory import count_up, pointer_to
from flexrun.attention.vectors import MULTIPLIES_PAIRS, Decorator, kernel, part

_floats, _ints = pointer_to(types.float32), pointer_to(types.int64)
_uint16s, _int16s = pointer_to(types.uint16), pointer_to(types.int16)
_cached_kernel: Decorator = njit(cache=True, nogil=True, error_model="numpy")
_callback: Decorator = cfunc(types.void(types.CPointer(types.int64)), cache=True)
_FINISHED = 25
"""Place of the number of shares that are done in a job, a table of int64: next share, shares, K, G,
T, D, V, window, chunk, spans, entries, most states of a span, rows, cells; eleven addresses; this.
"""


@dataclass(frozen=True, slots=True)
class Job:
    """One call of the kernel; the arrays and numbers are those of `attend_share`."""

    query: Any
    cells: Any
    sizes: tuple[int, int, int, int, int]
    masks: tuple[int, int, float, float]
    spans: Any
    pages: Any
    indices: Any
    out: Any
    lse: Any
    rows: int
    most_rows: int
    """Of one span."""


@kernel
def _take_shares(job: Any, queries: Any, pool: Any) -> None:
    """Shares of `job`, a table of numbers and addresses, until none is left.

    queries, pool: two of the addresses, as pointers to what is there.
    """
    shares, entries, states, rows = job[1], job[10], job[11], job[12]
    sizes = (job[2], job[3], job[4], job[5], job[6])
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


@_cached_kernel
def _merge_parts(
    spans: Any, heads: Any, dim: Any, part_span: Any, part_out: Any, part_lse: Any, out: Any,
    lse: Any,
) -> None:  # fmt: skip
    """Put spans together that were cut: part_span [parts], -1 for none, others like in shares.

    out and lse of these spans start as zeros and -inf.
    """
    for number in range(part_span.shape[0]):
        span = part_span[number]
        if span < 0:
            continue
        first = spans[span, 0] * heads
        for state in range(spans[span, 1] * heads):
            new, old = part_lse[number, state], lse[first + state]
            if new == -np.inf:
                continue
            high = max(old, new)
            a, b = np.exp(old - high), np.exp(new - high)
            lse[first + state] = high + np.log(a + b)
            for i in range(dim):
                at = (first + state) * dim + i
                out[at] = (out[at] * a + part_out[number, state * dim + i] * b) / (a + b)


@part
def _compiled_from(stamp: Any) -> None:
    """Does nothing. A function that hands over what it closes over is cached apart for each."""


def _callbacks(stamp: int) -> dict[tuple[str, str], Any]:
    """Entry points by how query and cells are held.

    Numba's cache notices changes in a function's own file and in what it closes over, but not in
    what it calls: hence `stamp`, of all sources.
    """

    @_callback
    def on_bfloat16(data: Any) -> None:
        _compiled_from(stamp)
        job = carray(data, _FINISHED + 1)
        _take_shares(job, _floats(job[16]), _uint16s(job[14]))

    @_callback
    def on_float16(data: Any) -> None:
        _compiled_from(stamp)
        job = carray(data, _FINISHED + 1)
        _take_shares(job, _floats(job[16]), _int16s(job[14]))

    @_callback
    def on_float32(data: Any) -> None:
        _compiled_from(stamp)
        job = carray(data, _FINISHED + 1)
        _take_shares(job, _floats(job[16]), _floats(job[14]))

    found = {
        ("float32", "uint16"): on_bfloat16,
        ("float32", "int16"): on_float16,
        ("float32", "float32"): on_float32,
    }
    if MULTIPLIES_PAIRS:

        @_callback
        def on_pairs(data: Any) -> None:
            _compiled_from(stamp)
            job = carray(data, _FINISHED + 1)
            _take_shares(job, _uint16s(job[16]), _uint16s(job[14]))

        found["uint16", "uint16"] = on_pairs
    return found


def _stamp_of(directory: Path) -> int:
    """A number that is another one when any source in `directory` is."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(directory.glob("*.py"))))


_CALLBACKS = _callbacks(_stamp_of(Path(__file__).parent))


class Team:
    """Threads that take the shares of a job."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._start = _start_of_openmp()
        self._pool: ThreadPoolExecutor | None = None

    def run(self, job: Job, shares: int) -> None:
        """Attend in so many shares."""
        heads, value_dim = job.sizes[0] * job.sizes[1], job.sizes[4]
        states = job.most_rows * heads
        part_span = np.full((shares, 2), -1, np.int64)
        part_out = np.empty((shares, 2, states * value_dim), np.float32)
        part_lse = np.empty((shares, 2, states), np.float32)
        factors = np.array(job.masks[2:], np.float32)
        spans, entries = len(job.spans) - 1, len(job.pages)
        counts = [0, shares, *job.sizes, *job.masks[:2], spans, entries, states, job.rows]
        arrays = [job.cells, factors, job.query, job.out, job.lse, job.spans, job.pages]
        arrays += [job.indices, part_span, part_out, part_lse]
        addresses = (each.ctypes.data for each in arrays)
        table = np.array([*counts, len(job.cells), *addresses, 0], np.int64)
        self._share(
            _CALLBACKS[job.query.dtype.name, job.cells.dtype.name],
            table,
            min(self._threads, shares),
        )
        if table[_FINISHED] != shares:  # compiled code cannot raise through OpenMP
            raise MemoryError("attention ran out of memory for its sums")
        if shares > 1:
            parts = (each.reshape(2 * shares, -1) for each in (part_out, part_lse))
            into = job.out, job.lse
            _merge_parts(job.spans, heads, value_dim, part_span.reshape(-1), *parts, *into)

    def _share(self, callback: Any, table: Any, threads: int) -> None:
        address = ctypes.cast(table.ctypes.data, ctypes.POINTER(ctypes.c_int64))
        if threads == 1:
            callback.ctypes(address)  # like all of these, without Python's lock
        elif self._start is not None:
            # As many threads as torch has: a team of another size would be made anew.
            self._start(ctypes.c_void_p(callback.address), address, self._threads, 0)
        else:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads - 1, "attention")
            others = [self._pool.submit(callback.ctypes, address) for _ in range(threads - 1)]
            callback.ctypes(address)
            for other in others:
                other.result()

    def close(self) -> None:
        """Give back threads."""
        if self._pool is not None:
            self._pool.shutdown()


@functools.cache
def _start_of_openmp() -> Any:
    """`GOMP_parallel(function, data, threads, flags)` of the library that torch uses, if any."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    here = Path(torch.__file__).parent
    for path in (
        *(here / "lib").glob("libgomp*.so*"),
        *(here.parent / "torch.libs").glob("libgomp*"),
    ):
        try:
            return ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
    return None
