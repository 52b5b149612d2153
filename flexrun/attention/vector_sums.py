"""Sums and maxima across the lanes of vectors, and how they are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from compression.compiled import address_of, operation
from compression.vectors import FLOATS, larger_of, vector

_INT = ir.IntType(32)
_FOUR = ir.VectorType(ir.FloatType(), 4)
# Lanes of two vectors that are added: halves of each, ...
_HALVES = [[*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]]
# ... of such a sum the quarters of each half, and of these, in both vectors, the neighbours.
_QUARTERS = [[at + 8 * k + i for k in range(4) for i in range(4)] for at in (0, 4)]
_PAIRS = [
    [4 * k + i + other for k in range(4) for other in (0, 16) for i in (at, at + 2)]
    for at in (0, 1)
]

# Quarters of each half.
_HALVES_OF_ONE = [[at + 8 * k + i for k in range(2) for i in range(4)] for at in (0, 4)]


@operation
def fold(_: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sums over four lanes of each of four vectors: those of `a` in lanes 0 to 3, and so on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c, d = arguments
        ab, cd = _added(builder, a, b, _HALVES), _added(builder, c, d, _HALVES)
        return _added(builder, ab, cd, _QUARTERS)

    return vector(vector, vector, vector, vector), generate


def _added(builder: Any, a: Any, b: Any, lanes: list[list[int]]) -> Any:
    return builder.fadd(*(_pick(builder, a, b, each) for each in lanes))


def _by_row(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    ab, cd = _added(builder, a, b, _PAIRS), _added(builder, c, d, _PAIRS)
    sums = _added(builder, ab, cd, _PAIRS)
    return _pick(builder, sums, sums, [4 * q + t for t in range(4) for q in range(4)])


@operation
def by_row(_: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sixteen sums from four vectors of `fold`: the four of `a`, then those of `b`, …"""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _by_row(builder, *arguments)

    return vector(vector, vector, vector, vector), generate


@operation
def store_scores(_: Any, array: Any, index: Any, a: Any, b: Any, c: Any, d: Any, scale: Any) -> Any:
    """Put these sums, times scale, into sixteen elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments[:2])
        scaled = builder.fmul(_by_row(builder, *arguments[2:6]), arguments[6])
        builder.store(scaled, builder.bitcast(at, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, vector, vector, vector, vector), generate


@operation
def store_scores_of_two(
    _: Any, array: Any, index: Any, a: Any, b: Any, c: Any, d: Any, scale: Any
) -> Any:
    """Sums over the first half of each of four vectors, then over their second, times scale."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments[:2])
        a, b, c, d, scale = arguments[2:]
        ab, cd = _added(builder, a, b, _PAIRS), _added(builder, c, d, _PAIRS)
        quarters = builder.fmul(_added(builder, ab, cd, _PAIRS), scale)
        eight = _added(builder, quarters, quarters, _HALVES_OF_ONE)
        builder.store(eight, builder.bitcast(at, eight.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, vector, vector, vector, vector), generate


def _pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))


def _fold(builder: Any, value: Any, join: Any) -> Any:
    """Four lanes from sixteen: what is in lanes 0, 4, 8 and 12 joined, and so on."""
    for width in (8, 4):
        halves = [*range(width)], [*range(width, 2 * width)]
        value = join(builder, *(_pick(builder, value, value, lanes) for lanes in halves))
    return value


def _store_folded(join: Callable[..., Any]) -> Callable[..., Any]:
    """Put lanes k, k + 4, k + 8 and k + 12, joined, into element index + k, k = 0 to 3."""

    def typed(_: Any, array: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            at = address_of(context, builder, signature.args[0], *arguments[:2])
            joined = _fold(builder, arguments[2], join)
            builder.store(joined, builder.bitcast(at, _FOUR.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(array, types.intp, vector), generate

    return typed


store_folded_max = operation(_store_folded(larger_of))
store_folded_sum = operation(_store_folded(ir.IRBuilder.fadd))


@operation
def load_repeated(_: Any, array: Any, index: Any) -> Any:
    """Four elements, in lanes 0 to 3, again in 4 to 7, and so on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments)
        four = builder.load(builder.bitcast(at, _FOUR.as_pointer()), align=4)
        return _pick(builder, four, four, [0, 1, 2, 3] * 4)

    return vector(array, types.intp), generate
