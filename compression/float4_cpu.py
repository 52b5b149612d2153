"""Expands floats of 4 bits on the CPU, a group as two vectors.

As a float16 such a code is 2^14 too small: its exponent is counted from 1 and not from 15.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from compression.compiled import address_of, operation, part
from compression.number_bits import power_of_two
from compression.vectors import FLOATS, INTS, LANES, F, mul, splat, vector

_BYTES, _SHORTS = (ir.VectorType(ir.IntType(bits), LANES) for bits in (8, 16))
_HALVES = ir.VectorType(ir.HalfType(), LANES)


@part
def expand_float4(packed: Any, columns: Any, out: Any) -> None:
    """A packed row of whole groups of 32, which have a byte each behind all codes."""
    groups = columns // (2 * LANES)
    for each in range(groups):
        scale = splat(power_of_two(packed[groups * LANES + each]))
        low, high = _load(packed, each * LANES)
        _store(out, each * 2 * LANES, mul(mul(low, splat(F(1 << 14))), scale))
        _store(out, each * 2 * LANES + LANES, mul(mul(high, splat(F(1 << 14))), scale))


@operation
def _load(_: Any, array: Any, index: Any) -> Any:
    """Of 16 bytes the low and the high halves: codes seen as float16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments)
        both = builder.load(builder.bitcast(at, _BYTES.as_pointer()), align=1)
        both, two = builder.zext(both, _SHORTS), []
        for shift in (0, 4):
            code = builder.lshr(both, _all(_SHORTS, shift))
            sign = builder.shl(builder.and_(code, _all(_SHORTS, 8)), _all(_SHORTS, 12))
            size = builder.shl(builder.and_(code, _all(_SHORTS, 7)), _all(_SHORTS, 9))
            two.append(builder.fpext(builder.bitcast(builder.or_(sign, size), _HALVES), FLOATS))
        return context.make_tuple(builder, signature.return_type, two)

    return types.UniTuple(vector, 2)(array, types.intp), generate


@operation
def _store(_: Any, array: Any, index: Any, value: Any) -> Any:
    """As float32 or, into uint16, as bfloat16: with at most two bits set, nothing is rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments[:2])
        value, nbytes = arguments[2], signature.args[0].dtype.bitwidth // 8
        if nbytes == 2:
            bits = builder.lshr(builder.bitcast(value, INTS), _all(INTS, 16))
            value = builder.trunc(bits, _SHORTS)
        builder.store(value, builder.bitcast(at, value.type.as_pointer()), align=nbytes)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


def _all(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * LANES)
