"""Element formats and the bytes they take: the one home of "how large is a value" (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}
"""Bits of one value in each plain floating-point format weights and KV cache are stored in."""
GROUPS = (32, 64, 128)
"""Values that may share a scale and a centre."""
CODE_BITS = (4, 8)
_NUMBER_BYTES = {"bfloat16": 4, "float16": 4, "float32": 4, "e8m0": 1}
"""Of a group besides its codes: two numbers of 16 bits, or one."""


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a dense tensor of `shape` (elements per axis) stored as `dtype`."""
    return prod(shape) * BITS[dtype] // 8


@dataclass(frozen=True, slots=True)
class GroupFormat:
    """Codes of few bits, and for each group of neighbours two numbers of 16 bits.

    value = centre + scale * (code - zero_code), code from 0 to `most_code`. With the centre in the
    middle of a group's range, and not at its end, it is small, and so is the error of its rounding.
    Codes may be floats, too: then value = scale * code, and a group has that one number.

    Groups run along the last axis of a tensor, unless it is `turned`; a row's last group may be
    shorter. A row is stored in one piece, [codes | scales | centres], so that rows of a table can
    be gathered. Of 4 bits, byte i of a group of n values has value i in its low half and value i +
    ceil(n / 2) in its high one: neighbours are expanded to neighbours, without shuffling them.
    """

    bits: int = 4
    group: int = 64
    numbers: str = "bfloat16"
    """Type of scales and centres: bfloat16, or float16 for what is float16 anyway. The scale of
    codes that are floats of 8 bits (1 of sign, 4 of exponent, 3 of mantissa) is float32, that of
    floats of 4 bits (1, 2 and 1) is e8m0: a byte s that stands for 2^(s - 127).
    """

    def __post_init__(self) -> None:
        if self.bits not in CODE_BITS or self.group not in GROUPS:
            raise ValueError(f"no format has {self.bits} bits in groups of {self.group}")
        floats = (self.numbers, self.bits) in (("float32", 8), ("e8m0", 4))
        if BITS.get(self.numbers) != 16 and not floats:
            raise ValueError(f"no format of {self.bits} bits has scales of type {self.numbers}")
        if self.float4 and self.group != 32:
            raise ValueError(f"no format of floats of 4 bits has groups of {self.group}")

    @property
    def float8(self) -> bool:
        """Codes are floats of 8 bits."""
        return self.numbers == "float32"

    @property
    def float4(self) -> bool:
        """Codes are floats of 4 bits: MXFP4."""
        return self.numbers == "e8m0"

    @property
    def turned(self) -> bool:
        """Groups run along the last axis but one: rows are the columns of the model's matrices.

        Models whose checkpoints come in MXFP4 have the inputs of their experts first.
        """
        return self.float4

    @property
    def most_code(self) -> int:
        """The largest code; the smallest is 0."""
        return (1 << self.bits) - 1

    @property
    def zero_code(self) -> int:
        """The code of a value that is a group's centre."""
        return 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """Of a row of so many values."""
        return -(-columns // self.group)

    def code_bytes(self, columns: int) -> int:
        """Of a row's codes: an even number, because numbers of 16 bits follow."""
        per_byte = 8 // self.bits
        return 2 * -(-columns // (2 * per_byte))

    def row_bytes(self, columns: int) -> int:
        """Of a row of so many values."""
        return self.code_bytes(columns) + _NUMBER_BYTES[self.numbers] * self.groups(columns)

    def as_rows(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The same tensor, row after row: if `turned`, the last two axes have changed places."""
        if not self.turned:
            return tuple(shape)
        *outer, first, last = shape
        return (*outer, last, first)

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the rows, as bytes, of a tensor of `shape`."""
        *rows, columns = self.as_rows(shape)
        return (*rows, self.row_bytes(columns))

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of `shape`: 4.5 bits per value for 4 bits and whole groups of 64.

        MXFP4: 4.25.
        """
        return prod(self.packed_shape(shape))
