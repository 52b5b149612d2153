"""Runs the shares of a compiled kernel on the very threads that torch computes with.

After each of its own operations torch's OpenMP threads spin for milliseconds, waiting for the next;
threads of ours would share the cores with them and take twice as long. So the shares are given to
that team, by the entry point that compilers use for OpenMP regions. Where torch has no such
library, threads of a pool take them.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch


class Crew:
    """Threads that take shares until none is left."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._start = start_of_openmp()
        self._pool: ThreadPoolExecutor | None = None

    def run(self, callback: Any, table: Any, shares: int) -> None:
        """Call `callback` (of `compiled.callback`) with `table`, a pointer, in several threads.

        In as many as there are, or as there are `shares`, which they have to count themselves.
        """
        threads = min(self._threads, shares)
        if threads == 1:
            _called(callback)(table)
        elif self._start is not None:
            # As many threads as torch has: a team of another size would be made anew.
            self._start(ctypes.c_void_p(callback.address), table, self._threads, 0)
        else:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads - 1, "kernel")
            call = _called(callback)
            others = [self._pool.submit(call, table) for _ in range(threads - 1)]
            call(table)
            for other in others:
                other.result()

    def close(self) -> None:
        """Give back threads."""
        if self._pool is not None:
            self._pool.shutdown()


@functools.cache
def _called(callback: Any) -> Any:
    """The same for Python, which Numba would make anew each time."""
    return callback.ctypes


@functools.cache
def start_of_openmp() -> Any:
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
