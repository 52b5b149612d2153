"""Weights as words of sixteen bits, two rows at a time: what they are multiplied with stays codes.

For processors whose registers hold eight float32. A word of a row's code and one of the next row's
lie side by side, and so do the two rows' weights: one instruction multiplies both and adds them up.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from compression.code_vectors import words_added
from compression.compiled import address_of, operation
from compression.vectors import FLOATS, INTS, LANES, joined, vector

_BYTE, _SHORT, _INT = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_EIGHT = ir.VectorType(_INT, LANES // 2)
_SHORTS = ir.VectorType(_SHORT, LANES)


@operation
def store_words(_: Any, array: Any, index: Any, weights: Any) -> Any:
    """Put whole numbers [4 rows, 4], as words, into eight elements: two rows' next to each other.

    They are four pairs of the first two rows, then four of the others.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments[:2])
        words = builder.trunc(builder.fptosi(arguments[2], INTS), _SHORTS)
        order = [8 * two + lane + row for two in (0, 1) for lane in range(4) for row in (0, 4)]
        words = builder.shuffle_vector(words, words, ir.Constant(INTS, order))
        builder.store(words, builder.bitcast(at, _SHORTS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@operation
def load_codes(_: Any, array: Any, a: Any, b: Any) -> Any:
    """Low halves of eight bytes, then high ones: those at `a` and at `b` are a lane's two words."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        eight, rows = ir.VectorType(_BYTE, 8), []
        for index in arguments[1:]:
            at = address_of(context, builder, signature.args[0], arguments[0], index)
            rows.append(builder.load(builder.bitcast(at, eight.as_pointer()), align=1))
        order = [row + byte for byte in range(8) for row in (0, 8)]
        both = builder.shuffle_vector(*rows, ir.Constant(INTS, order))
        wide = builder.zext(both, _SHORTS)
        low = builder.and_(wide, ir.Constant(_SHORTS, [15] * LANES))
        high = builder.lshr(wide, ir.Constant(_SHORTS, [4] * LANES))
        two = (builder.bitcast(each, _EIGHT) for each in (low, high))
        return builder.bitcast(joined(builder, *two), FLOATS)

    return vector(array, types.intp, types.intp), generate


@operation
def add_weighted(_: Any, array: Any, index: Any, codes: Any, sums: Any) -> Any:
    """sums + both words of each lane times the two at `index`; whole numbers of 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments[:2])
        pair = builder.load(builder.bitcast(at, _INT.as_pointer()), align=4)
        first = builder.insert_element(ir.Constant(INTS, ir.Undefined), pair, _INT(0))
        both = builder.shuffle_vector(first, first, ir.Constant(INTS, [0] * LANES))
        return words_added(builder, arguments[3], arguments[2], both)

    return vector(array, types.intp, vector, vector), generate


@operation
def add_scaled(_: Any, array: Any, a: Any, b: Any, sums: Any, factor: Any, more: Any) -> Any:
    """Add whole numbers `sums` times `factor`, and `more`, to eight elements at `a` and at `b`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = ir.VectorType(ir.FloatType(), LANES // 2)
        whole = builder.sitofp(builder.bitcast(arguments[3], INTS), FLOATS)
        added = builder.fadd(builder.fmul(whole, arguments[4]), arguments[5])
        for number, index in enumerate(arguments[1:3]):
            at = address_of(context, builder, signature.args[0], arguments[0], index)
            place = builder.bitcast(at, half.as_pointer())
            lanes = ir.Constant(_EIGHT, [8 * number + lane for lane in range(8)])
            mine = builder.shuffle_vector(added, added, lanes)
            builder.store(builder.fadd(builder.load(place, align=4), mine), place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, vector, vector, vector), generate
