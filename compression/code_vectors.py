"""Vectors from codes of four bits, as they lie in the rows of a `GroupFormat`.

Arrays are bytes here. Byte i of a group has one value in its low half and one in its high half: a
load of neighbouring bytes gives two vectors of neighbouring values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from compression.compiled import address_of, operation
from compression.vectors import FEATURES, FLOATS, INTS, LANES, REGISTER, fused, joined, vector

_ADDS_WORDS = "+avx512vnni" in FEATURES
MULTIPLIES_WORDS = _ADDS_WORDS or (REGISTER < LANES and "+avx2" in FEATURES)
"""Whether compiled code may multiply pairs of 16-bit integers and add them up in 32 bits.

That is four times as fast as products of pairs of bfloat16 where there are those, twice as fast as
of float32 where not, and rounds queries less than bfloat16 does.
"""
MOST = 32767
"""The largest word of a query."""
_WORD, _SHORT = ir.IntType(32), ir.IntType(16)
_FOUR, _EIGHT = ir.VectorType(_WORD, 4), ir.VectorType(_WORD, 8)
_SHORTS = ir.VectorType(_SHORT, 2 * LANES)


def _all(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


@operation
def load_bytes(_: Any, array: Any, index: Any) -> Any:
    """Of 16 bytes the low halves, and the bytes: 16 * high half + low half; as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[0], *arguments)
        lanes = ir.VectorType(ir.IntType(8), LANES)
        both = builder.zext(builder.load(builder.bitcast(at, lanes.as_pointer()), align=1), INTS)
        low = builder.and_(both, _all(INTS, 15))
        two = [builder.sitofp(each, FLOATS) for each in (low, both)]
        return context.make_tuple(builder, signature.return_type, two)

    return types.UniTuple(vector, 2)(array, types.intp), generate


@operation
def takes_words(_: Any, query: Any) -> Any:
    """Whether such queries are rounded to whole numbers of sixteen bits: those in bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.IntType(1)(int(_in_words(signature.args[0])))

    return types.boolean(query), generate


def _in_words(query: Any) -> bool:
    return MULTIPLIES_WORDS and query.dtype == types.uint16


@operation
def store_query(_: Any, query: Any, array: Any, index: Any, low: Any, high: Any) -> Any:
    """Put 16 values that low halves of bytes are multiplied with, and 16 for high halves.

    In the order in which `add_codes` needs them; whole numbers as words, or float32. `query` only
    says which.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = address_of(context, builder, signature.args[1], *arguments[1:3])
        words = _in_words(signature.args[0])
        two = arguments[3:]
        if words:
            shorts = ir.VectorType(_SHORT, LANES)
            two = [builder.trunc(builder.fptosi(each, INTS), shorts) for each in two]
        steps = 2 if words else 4  # bytes of a lane, each with two codes
        order = [
            start + half + byte
            for byte in range(steps)
            for half in (0, LANES)
            for start in range(0, LANES, steps)
        ]
        picked = builder.shuffle_vector(*two, ir.Constant(ir.VectorType(_WORD, 2 * LANES), order))
        builder.store(picked, builder.bitcast(at, picked.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(query, array, types.intp, vector, vector), generate


@operation
def load_rows(_: Any, array: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """16 bytes from each of four places, in one vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        four = []
        for index in arguments[1:]:
            at = address_of(context, builder, signature.args[0], arguments[0], index)
            four.append(builder.load(builder.bitcast(at, _FOUR.as_pointer()), align=1))
        ab, cd = (joined(builder, *pair) for pair in (four[:2], four[2:]))
        return builder.bitcast(joined(builder, ab, cd), FLOATS)

    return vector(array, *[types.intp] * 4), generate


@operation
def add_codes(_: Any, query: Any, array: Any, index: Any, rows: Any, sums: Any) -> Any:
    """sums + products of four rows of 32 codes with what `store_query` put at `index`.

    Lanes 0 to 3 are parts of the first row's sum, and so on; whole numbers where queries are words.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = _in_words(signature.args[0])
        kind = _SHORTS if words else INTS
        at = address_of(context, builder, signature.args[1], *arguments[1:3])
        bits, total = builder.bitcast(arguments[3], kind), [arguments[4], _all(FLOATS, 0.0)]
        steps = kind.element.width // 4
        for step in range(steps):
            shifted = builder.lshr(bits, _all(kind, 4 * step)) if step else bits
            code = builder.and_(shifted, _all(kind, 15))
            place = builder.gep(at, [ir.IntType(64)(4 * step)])
            four = builder.load(builder.bitcast(place, _FOUR.as_pointer()), align=4)
            lanes = ir.Constant(INTS, [0, 1, 2, 3] * 4)
            factor = builder.shuffle_vector(four, four, lanes)
            chain = 2 * step // steps  # two of half the length: each step waits for the one before
            if words:
                total[chain] = words_added(builder, total[chain], code, factor)
            else:
                floats = builder.sitofp(code, FLOATS), builder.bitcast(factor, FLOATS)
                total[chain] = fused(builder, *floats, total[chain])
        if words:
            both = builder.add(*(builder.bitcast(each, INTS) for each in total))
            return builder.bitcast(both, FLOATS)
        return builder.fadd(*total)

    return vector(query, array, types.intp, vector, vector), generate


def words_added(builder: Any, total: Any, code: Any, factor: Any) -> Any:
    """Whole numbers: products of pairs of words, added up in 32 bits."""
    total, code, factor = (builder.bitcast(each, INTS) for each in (total, code, factor))
    if _ADDS_WORDS:
        kind = ir.FunctionType(INTS, [INTS, INTS, INTS])
        name = "llvm.x86.avx512.vpdpwssd.512"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.bitcast(builder.call(function, [total, code, factor]), FLOATS)
    halves = [
        _products_of_words(builder, *(builder.shuffle_vector(x, x, lanes) for x in (code, factor)))
        for lanes in (ir.Constant(_EIGHT, [*range(at, at + 8)]) for at in (0, 8))
    ]
    return builder.bitcast(builder.add(total, joined(builder, *halves)), FLOATS)


def _products_of_words(builder: Any, code: Any, factor: Any) -> Any:
    """Of eight pairs, each pair's added up."""
    shorts = ir.VectorType(_SHORT, LANES)
    kind = ir.FunctionType(_EIGHT, [shorts, shorts])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
    return builder.call(function, [builder.bitcast(each, shorts) for each in (code, factor)])


@operation
def sum_codes(_: Any, query: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sixteen sums from the parts of four queries: for the first row those of all, and so on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = _in_words(signature.args[0])
        four = [builder.bitcast(each, INTS if words else FLOATS) for each in arguments[1:]]
        ab, cd = (_pairs_added(builder, *pair) for pair in (four[:2], four[2:]))
        found = _pairs_added(builder, ab, cd)
        return builder.sitofp(found, FLOATS) if words else found

    return vector(query, vector, vector, vector, vector), generate


def _pairs_added(builder: Any, a: Any, b: Any) -> Any:
    """Neighbours added, in every four lanes those of `a` and then those of `b`."""
    picked = []
    for odd in (0, 1):
        lanes = [4 * k + other + i + odd for k in range(4) for other in (0, LANES) for i in (0, 2)]
        picked.append(builder.shuffle_vector(a, b, ir.Constant(INTS, lanes)))
    return builder.add(*picked) if a.type == INTS else builder.fadd(*picked)


@operation
def load_words(_: Any, array: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four words of 32 bits, that at `a` in lanes 0 to 3, that at `b` in 4 to 7, and so on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = ir.Constant(INTS, ir.Undefined)
        for number, index in enumerate(arguments[1:]):
            at = address_of(context, builder, signature.args[0], arguments[0], index)
            word = builder.load(builder.bitcast(at, _WORD.as_pointer()), align=1)
            one = builder.insert_element(ir.Constant(INTS, ir.Undefined), word, _WORD(0))
            lanes = [0 if lane // 4 == number else LANES + lane for lane in range(LANES)]
            found = builder.shuffle_vector(one, found, ir.Constant(INTS, lanes))
        return builder.bitcast(found, FLOATS)

    return vector(array, *[types.intp] * 4), generate


def _widened(of_words: Callable[..., Any], half: bool) -> Any:
    """An operation that makes float32 of 16 of the 32 bits of each lane."""

    def typed(_: Any, words: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            high = of_words(builder, builder.bitcast(arguments[0], INTS))
            if not half:
                return builder.bitcast(high, FLOATS)
            shorts = ir.VectorType(ir.IntType(16), LANES)
            bits = builder.trunc(builder.lshr(high, _all(INTS, 16)), shorts)
            return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), FLOATS)

        return vector(vector), generate

    return operation(typed)


def _raised(builder: Any, words: Any) -> Any:
    return builder.shl(words, _all(INTS, 16))


def _kept(builder: Any, words: Any) -> Any:
    return builder.and_(words, _all(INTS, 0xFFFF0000))


low_bfloat16, low_float16 = (_widened(_raised, half) for half in (False, True))
high_bfloat16, high_float16 = (_widened(_kept, half) for half in (False, True))
