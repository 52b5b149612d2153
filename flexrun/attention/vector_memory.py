"""Vectors from arrays and into them, without checks: indices are not counted from the end either.

What Numba does for negative indices is what keeps its own loops over arrays from vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.arrayobj import make_array

from flexrun.attention.vectors import FLOATS, INTS, LANES, larger_of, operation, vector

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FOUR = ir.VectorType(_FLOAT, 4)


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(make_array(kind)(context, builder, array).data, [index])


def _widened(builder: Any, dtype: Any, cells: Any, lanes: Any) -> Any:
    """float32 from how an array holds values: uint16 is bfloat16, int16 is float16."""
    wide = isinstance(lanes, ir.VectorType)
    floats = ir.VectorType(_FLOAT, LANES) if wide else _FLOAT
    if dtype == types.uint16:
        ints = INTS if wide else _INT
        shift = ir.Constant(ints, [16] * LANES if wide else 16)
        return builder.bitcast(builder.shl(builder.zext(cells, ints), shift), floats)
    if dtype == types.int16:
        halves = ir.VectorType(ir.HalfType(), LANES) if wide else ir.HalfType()
        return builder.fpext(builder.bitcast(cells, halves), floats)
    return cells


@operation
def load(_: Any, array: Any, index: Any) -> Any:
    """Elements index to index + 16 of a flat array, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        at = _address(context, builder, kind, *arguments)
        lanes = ir.VectorType(at.type.pointee, LANES)
        cells = builder.load(
            builder.bitcast(at, lanes.as_pointer()), align=kind.dtype.bitwidth // 8
        )
        return _widened(builder, kind.dtype, cells, lanes)

    return vector(array, types.intp), generate


@operation
def prefetch(_: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of element `index`; beyond the array nothing happens."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _address(context, builder, signature.args[0], *arguments)
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(at, byte), _INT(0), _INT(3), _INT(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@operation
def load_one(_: Any, array: Any, index: Any) -> Any:
    """Element `index` of a flat array, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _address(context, builder, signature.args[0], *arguments)
        return _widened(builder, signature.args[0].dtype, builder.load(at), None)

    return types.float32(array, types.intp), generate


@operation
def store(_: Any, array: Any, index: Any, value: Any) -> Any:
    """Put a vector into a flat float32 array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(at, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@operation
def store_one(_: Any, array: Any, index: Any, value: Any) -> Any:
    """Put a number into a flat float32 array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _address(context, builder, signature.args[0], *arguments[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), generate


@operation
def store_sums(_: Any, array: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Put the sums over the lanes of four vectors into four neighbouring elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _address(context, builder, signature.args[0], *arguments[:2])
        quarters = [_fold(builder, each, ir.IRBuilder.fadd) for each in arguments[2:]]
        _store_four(builder, _transposed_sum(builder, quarters), at)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, vector, vector, vector), generate


def _store_four(builder: Any, value: Any, at: Any) -> None:
    builder.store(value, builder.bitcast(at, _FOUR.as_pointer()), align=4)


def _pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))


def _fold(builder: Any, value: Any, join: Any) -> Any:
    """Four lanes from sixteen: what is in lanes 0, 4, 8 and 12 joined, and so on."""
    for width in (8, 4):
        halves = [*range(width)], [*range(width, 2 * width)]
        value = join(builder, *(_pick(builder, value, value, lanes) for lanes in halves))
    return value


def _transposed_sum(builder: Any, rows: list[Any]) -> Any:
    a, b, c, d = rows
    ab = builder.fadd(_pick(builder, a, b, [0, 4, 1, 5]), _pick(builder, a, b, [2, 6, 3, 7]))
    cd = builder.fadd(_pick(builder, c, d, [0, 4, 1, 5]), _pick(builder, c, d, [2, 6, 3, 7]))
    return builder.fadd(_pick(builder, ab, cd, [0, 1, 4, 5]), _pick(builder, ab, cd, [2, 3, 6, 7]))


@operation
def store_folded_max(_: Any, array: Any, index: Any, value: Any) -> Any:
    """Put the largest of lanes k, k + 4, k + 8 and k + 12 into element index + k, k = 0 to 3."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _address(context, builder, signature.args[0], *arguments[:2])
        _store_four(builder, _fold(builder, arguments[2], larger_of), at)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@operation
def store_folded_sum(_: Any, array: Any, index: Any, value: Any) -> Any:
    """Put the sum of lanes k, k + 4, k + 8 and k + 12 into element index + k, k = 0 to 3."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _address(context, builder, signature.args[0], *arguments[:2])
        _store_four(builder, _fold(builder, arguments[2], ir.IRBuilder.fadd), at)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@operation
def load_repeated(_: Any, array: Any, index: Any) -> Any:
    """Four elements, in lanes 0 to 3, again in 4 to 7, and so on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _address(context, builder, signature.args[0], *arguments)
        four = builder.load(builder.bitcast(at, _FOUR.as_pointer()), align=4)
        return _pick(builder, four, four, [0, 1, 2, 3] * 4)

    return vector(array, types.intp), generate


@operation
def count_up(_: Any, array: Any, index: Any) -> Any:
    """What an element of an int64 array was before this added one: no two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _address(context, builder, signature.args[0], *arguments)
        return builder.atomic_rmw("add", at, ir.IntType(64)(1), "seq_cst")

    return types.int64(array, types.intp), generate


def pointer_to(kind: Any) -> Callable[..., Any]:
    """An operation that makes a pointer to values of type `kind` from an address."""

    def typed(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return operation(typed)
