"""Vectors from arrays and into them, without checks: indices are not counted from the end either.

What Numba does for negative indices is what keeps its own loops over arrays from vectors.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from compression.compiled import address_of, operation, part
from compression.vectors import (
    FLOATS,
    INTS,
    LANES,
    MULTIPLIES_PAIRS,
    REGISTER,
    fused,
    joined,
    vector,
)

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_HALF = ir.VectorType(_FLOAT, LANES // 2)


def _widened(builder: Any, dtype: Any, cells: Any, lanes: Any) -> Any:
    """float32 from how an array holds values: uint16 is bfloat16, int16 is float16."""
    wide = isinstance(lanes, ir.VectorType)
    floats = ir.VectorType(_FLOAT, lanes.count) if wide else _FLOAT
    if dtype == types.uint16:
        ints = ir.VectorType(_INT, lanes.count) if wide else _INT
        shift = ir.Constant(ints, [16] * lanes.count if wide else 16)
        return builder.bitcast(builder.shl(builder.zext(cells, ints), shift), floats)
    if dtype == types.int16:
        halves = ir.VectorType(ir.HalfType(), lanes.count) if wide else ir.HalfType()
        return builder.fpext(builder.bitcast(cells, halves), floats)
    return cells


@operation
def load(_: Any, array: Any, index: Any) -> Any:
    """Elements index to index + 16 of a flat array, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        at = address_of(context, builder, kind, *arguments)
        lanes = ir.VectorType(at.type.pointee, LANES)
        cells = builder.load(
            builder.bitcast(at, lanes.as_pointer()), align=kind.dtype.bitwidth // 8
        )
        return _widened(builder, kind.dtype, cells, lanes)

    return vector(array, types.intp), generate


def _two(builder: Any, dtype: Any, at: Any, count: int = LANES) -> list[Any]:
    """Twice `count` elements as two vectors of float32: see `load_two`."""
    floats, ints = ir.VectorType(_FLOAT, count), ir.VectorType(_INT, count)
    if dtype == types.uint16:
        # Half the loads, and one operation for each vector instead of two.
        both = builder.load(builder.bitcast(at, ints.as_pointer()), align=2)
        even = builder.shl(both, ir.Constant(ints, [16] * count))
        odd = builder.and_(both, ir.Constant(ints, [0xFFFF0000] * count))
        return [builder.bitcast(each, floats) for each in (even, odd)]
    lanes = ir.VectorType(at.type.pointee, count)
    starts = at, builder.gep(at, [ir.IntType(64)(count)])
    places = [builder.bitcast(start, lanes.as_pointer()) for start in starts]
    cells = [builder.load(place, align=dtype.bitwidth // 8) for place in places]
    return [_widened(builder, dtype, each, lanes) for each in cells]


@operation
def load_two(_: Any, array: Any, index: Any) -> Any:
    """32 elements from `index` on as two vectors; of bfloat16 the even ones, then the odd ones."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        at = address_of(context, builder, kind, *arguments)
        two = _two(builder, kind.dtype, at)
        return context.make_tuple(builder, signature.return_type, two)

    return types.UniTuple(vector, 2)(array, types.intp), generate


@operation
def load_halves(_: Any, array: Any, index: Any) -> Any:
    """16 elements from `index` on; of bfloat16 the even ones, then the odd ones."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        at = address_of(context, builder, kind, *arguments)
        return joined(builder, *_two(builder, kind.dtype, at, LANES // 2))

    return vector(array, types.intp), generate


@operation
def load_two_rows(_: Any, array: Any, a: Any, b: Any) -> Any:
    """16 elements from `a` on and 16 from `b` on, by turns eight of each.

    Of bfloat16 the even elements, then the odd ones.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, rows = signature.args[0], []
        for index in arguments[1:]:
            at = address_of(context, builder, kind, arguments[0], index)
            rows.append(_two(builder, kind.dtype, at, LANES // 2))
        two = [joined(builder, *pair) for pair in zip(*rows)]
        return context.make_tuple(builder, signature.return_type, two)

    return types.UniTuple(vector, 2)(array, types.intp, types.intp), generate


@operation
def load_twice(_: Any, array: Any, index: Any) -> Any:
    """Eight float32, twice."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments)
        half = builder.load(builder.bitcast(at, _HALF.as_pointer()), align=4)
        order = ir.Constant(INTS, [*range(LANES // 2)] * 2)
        return builder.shuffle_vector(half, half, order)

    return vector(array, types.intp), generate


@operation
def splits_pairs(_: Any, array: Any) -> Any:
    """Even elements before odd ones: so many of each in what `load_turned` gives, 0 for none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        split = signature.args[0].dtype == types.uint16
        return ir.IntType(64)(REGISTER * int(split))

    return types.int64(array), generate


@part
def load_turned(array: Any, row: Any, i: Any, dim: Any) -> Any:
    """Elements row + i to row + i + 16 of a row, in the order that `splits_pairs` tells.

    A register of bfloat16 becomes two of float32 without moving anything between lanes: with 16
    lanes each, the even or the odd ones of the 32 elements that hold these, where `dim` has them.
    """
    if REGISTER < LANES:
        return load_halves(array, row + i)
    first = i // (2 * LANES) * (2 * LANES)
    if first + 2 * LANES > dim:
        return load(array, row + i)
    two = load_two(array, row + first)
    return two[0] if i == first else two[1]


@operation
def line(_: Any, array: Any) -> Any:
    """Elements in a cache line."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.IntType(64)(512 // signature.args[0].dtype.bitwidth)

    return types.int64(array), generate


@operation
def add_products(_: Any, a: Any, i: Any, b: Any, k: Any, sums: Any) -> Any:
    """sums + the products of 32 elements of `a` and `b`, two for each lane.

    If `b` is bfloat16, `a` is, too, or it is float32 in the order of `load_two`. The processor's
    own products of pairs take numbers below 1e-38 for zero.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, total = (signature.args[0], signature.args[2]), arguments[4]
        places = [
            address_of(context, builder, kind, *arguments[at : at + 2])
            for kind, at in zip(kinds, (0, 2))
        ]
        if kinds[0].dtype == types.uint16 and MULTIPLIES_PAIRS:
            pairs = [builder.load(builder.bitcast(at, INTS.as_pointer()), align=2) for at in places]
            kind = ir.FunctionType(FLOATS, [FLOATS, INTS, INTS])
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            return builder.call(function, [total, *pairs])
        for left, right in zip(*(_two(builder, k.dtype, at) for k, at in zip(kinds, places))):
            total = fused(builder, left, right, total)
        return total

    return vector(a, types.intp, b, types.intp, vector), generate


@operation
def prefetch(_: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of element `index`; beyond the array nothing happens.

    Into the second-level cache: more misses may be on their way there than in the first, and what
    the first holds stays.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments)
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(at, byte), _INT(0), _INT(2), _INT(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@part
def prefetch_all(array: Any, first: Any, count: Any) -> None:
    """Ask for `count` elements from `first` on."""
    for i in range(first, first + count, line(array)):
        prefetch(array, i)


@operation
def load_one(_: Any, array: Any, index: Any) -> Any:
    """Element `index` of a flat array, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments)
        return _widened(builder, signature.args[0].dtype, builder.load(at), None)

    return types.float32(array, types.intp), generate


@operation
def store(_: Any, array: Any, index: Any, value: Any) -> Any:
    """Put a vector into a flat float32 array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(at, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate
