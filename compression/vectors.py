"""Vectors of sixteen float32 as a type of Numba's, for kernels that have to name their registers.

Numba vectorizes loops by chance; a loop over vectors does what it says. LLVM turns sixteen lanes
into what the processor has: one AVX-512 register, two of AVX2, four of NEON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.registry import cpu_target
from numba.extending import register_model

from compression.compiled import operation, part

LANES = 16
FEATURES = cpu_target.target_context.codegen().magic_tuple()[2]
"""Of this processor, as LLVM names them."""
REGISTER = 16 if "+avx512f" in FEATURES else 8
"""float32 that kernels take to fit a register: what they do with them keeps to their lanes."""
MULTIPLIES_PAIRS = "+avx512bf16" in FEATURES
"""Whether compiled code may multiply pairs of bfloat16 and add them up in float32."""
F = np.float32
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
FLOATS, INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__("float32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, FLOATS)


def _call(builder: Any, name: str, arguments: Any) -> Any:
    """One of LLVM's own functions of vectors."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * len(arguments))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def joined(builder: Any, a: Any, b: Any) -> Any:
    """Two vectors of one type as one."""
    lanes = ir.Constant(ir.VectorType(_INT, 2 * a.type.count), [*range(2 * a.type.count)])
    return builder.shuffle_vector(a, b, lanes)


@operation
def splat(_: Any, value: Any) -> Any:
    """The same number in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), arguments[0], _INT(0))
        lanes = ir.Constant(INTS, [0] * LANES)
        return builder.shuffle_vector(first, ir.Constant(FLOATS, ir.Undefined), lanes)

    return vector(types.float32), generate


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c"""
    return _call(builder, "llvm.fma.v16f32", [a, b, c])


@operation
def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c"""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return fused(builder, *arguments)

    return vector(vector, vector, vector), generate


def larger_of(builder: Any, a: Any, b: Any) -> Any:
    """The larger number in each lane."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _smaller_of(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _of_two(made: Callable[..., Any]) -> Callable[..., Any]:
    """An operation on two vectors, `made(builder, a, b)`."""

    def typed(_: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return made(builder, *arguments)

        return vector(vector, vector), generate

    return typed


add = operation(_of_two(ir.IRBuilder.fadd))
sub = operation(_of_two(ir.IRBuilder.fsub))
mul = operation(_of_two(ir.IRBuilder.fmul))
div = operation(_of_two(ir.IRBuilder.fdiv))
larger, smaller = operation(_of_two(larger_of)), operation(_of_two(_smaller_of))


@operation
def where_less(_: Any, a: Any, b: Any, chosen: Any, other: Any) -> Any:
    """In each lane `chosen` if a < b, else `other`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, chosen, other = arguments
        return builder.select(builder.fcmp_ordered("<", a, b), chosen, other)

    return vector(vector, vector, vector, vector), generate


@operation
def floor(_: Any, a: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, "llvm.floor.v16f32", arguments)

    return vector(vector), generate


@operation
def power_of_two(_: Any, a: Any) -> Any:
    """2^a of whole numbers from -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = builder.fptosi(arguments[0], INTS)
        biased = builder.add(whole, ir.Constant(INTS, [127] * LANES))
        return builder.bitcast(builder.shl(biased, ir.Constant(INTS, [23] * LANES)), FLOATS)

    return vector(vector), generate


@part
def exp(x: Any) -> Any:
    """e^x for x <= 88 to 2e-7: a power of two times a polynomial (Cephes' expf)."""
    x = larger(x, splat(F(-87.0)))
    k = floor(fma(x, splat(F(1.44269504)), splat(F(0.5))))
    r = fma(k, splat(F(-0.693359375)), x)
    r = fma(k, splat(F(2.12194440e-4)), r)
    p = fma(splat(F(1.9875691500e-4)), r, splat(F(1.3981999507e-3)))
    p = fma(p, r, splat(F(8.3334519073e-3)))
    p = fma(p, r, splat(F(4.1665795894e-2)))
    p = fma(p, r, splat(F(1.6666665459e-1)))
    p = fma(p, r, splat(F(5.0000001201e-1)))
    return mul(add(fma(p, mul(r, r), r), splat(F(1.0))), power_of_two(k))
