"""What kernels that Numba compiles are made of: decorators, pointers, a counter for threads."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

K = TypeVar("K")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
operation: Decorator = intrinsic
_PLAIN: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
kernel: Decorator = njit(**_PLAIN, boundscheck=False, fastmath={"contract"})
"""Not cached: a cache does not notice changes in what a kernel calls. Callbacks cache them all."""
part: Decorator = njit(**_PLAIN, boundscheck=False, fastmath={"contract"}, forceinline=True)
"""Of a kernel: a call would copy seven words for every array."""
cached_kernel: Decorator = njit(**_PLAIN, cache=True)
"""For what calls nothing of ours."""
callback: Decorator = cfunc(types.void(types.CPointer(types.int64)), cache=True)
"""An entry point for C code, which gets a table of numbers and addresses. It runs without Python's
lock. Has to call `compiled_from`."""


class Callbacks(Generic[K]):
    """Entry points, compiled when they are first asked for: each takes seconds."""

    def __init__(self, makers: Mapping[K, Callable[[int], Any]], stamp: int) -> None:
        """`makers`: functions that give a callback from a `stamp_of` what it calls."""
        self._makers, self._stamp = makers, stamp
        self._made: dict[K, Any] = {}
        self._lock = threading.Lock()

    def __getitem__(self, key: K) -> Any:
        """The entry point; one thread compiles it, and others wait."""
        with self._lock:
            if key not in self._made:
                self._made[key] = self._makers[key](self._stamp)
            return self._made[key]


@part
def compiled_from(stamp: Any) -> None:
    """Does nothing. A function that hands over what it closes over is cached apart for each.

    Numba's cache notices changes in a function's own file and in what it closes over, but not in
    what it calls: hence a `stamp_of` all sources.
    """


def stamp_of(directory: Path, *modules: ModuleType) -> int:
    """A number that is another one when a source in `directory`, or one of `modules`, is."""
    others = (Path(str(module.__file__)) for module in modules)
    sources = [*sorted(directory.glob("*.py")), *others]
    return zlib.crc32(b"".join(path.read_bytes() for path in sources))


def address_of(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Of an element, in an operation's code; not checked, nor counted from the end if negative."""
    return builder.gep(make_array(kind)(context, builder, array).data, [index])


@operation
def count_up(_: Any, array: Any, index: Any) -> Any:
    """What an element of an int64 array was before this added one: no two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments)
        return builder.atomic_rmw("add", at, ir.IntType(64)(1), "seq_cst")

    return types.int64(array, types.intp), generate


def pointer_to(kind: Any) -> Callable[..., Any]:
    """An operation that makes a pointer to values of type `kind` from an address."""

    def typed(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return operation(typed)
