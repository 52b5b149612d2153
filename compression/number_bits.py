"""Bits of floats in compiled code: bfloat16 and float16, for which Numba has no types."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from compression.compiled import operation, part

F, U = np.float32, np.uint32
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()


@operation
def float_of(_: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.uint32), generate


@operation
def bits_of(_: Any, value: Any) -> Any:
    """The 32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@operation
def widened_half(_: Any, bits: Any) -> Any:
    """float32 from the bits of a float16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], _HALF), _FLOAT)

    return types.float32(types.uint16), generate


@operation
def _half_of(_: Any, value: Any) -> Any:
    """Bits of the nearest float16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], _HALF), ir.IntType(16))

    return types.uint16(types.float32), generate


@part
def bfloat16_of(value: Any) -> Any:
    """Bits of the nearest bfloat16, the even one of two."""
    bits = bits_of(value)
    return np.uint16((bits + U(0x7FFF) + ((bits >> U(16)) & U(1))) >> U(16))


@part
def number(bits: Any, half: Any) -> Any:
    """A scale or a centre, from its bits; `half` says that they are a float16's."""
    return widened_half(bits) if half else float_of(U(bits) << U(16))


@part
def number_bits(value: Any, half: Any) -> Any:
    """Bits of the nearest one; of NaN those of a NaN that no rounding makes a number."""
    value = value if value == value else F(np.nan)
    return _half_of(value) if half else bfloat16_of(value)


@part
def joined(low: Any, high: Any) -> Any:
    """The float32 with these two halves of its bits."""
    return float_of(U(low) | U(high) << U(16))


@part
def power_of_two(bits: Any) -> Any:
    """The float32 2^(bits - 127), for a byte of bits; 0 stands for one that is not normal."""
    return float_of(U(bits) << U(23)) if bits else float_of(U(1 << 22))
