"""Which of a model's tensors are quantized, and how (no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from compression.spec import GroupFormat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PLAIN_BITS = 16
"""Of values that are stored as they are."""
WEIGHT_BITS = (PLAIN_BITS, 8, 4)
LEAST_VALUES = 4096
"""Of a matrix that is worth it: smaller ones are a few kilobytes of a model."""


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_NORM = re.compile(r"norm[^.]*\.[^.]*$|_norm$", re.IGNORECASE)
"""Norms of every head are matrices, too."""


def experts_of(config: Mapping[str, Any]) -> int:
    """Experts of a layer, by the names that a model's config.json has for them; 0 for none."""
    return next((int(config[name]) for name in _EXPERT_COUNTS if config.get(name)), 0)


@dataclass(frozen=True, slots=True)
class Quantization:
    """Bits of the large matrices; norms, biases and the routers of experts stay as they are."""

    weight_bits: int = PLAIN_BITS
    """Of the matrices of decoder layers."""
    head_bits: int = PLAIN_BITS
    """Of the output head and the embedding table."""
    group: int = 64
    keep: str = ""
    """A regular expression: tensors in whose names it is found stay as they are."""

    def of(
        self, name: str, shape: Sequence[int], dtype: str, *, in_layer: bool, experts: int
    ) -> GroupFormat | None:
        """The format of a tensor that is stored as `dtype` otherwise; None if it stays like that.

        `experts`: of a layer, 0 if it has none. A matrix with a row for each is their router, which
        decides what is computed at all.
        """
        bits = self.weight_bits if in_layer else self.head_bits
        special = (len(shape) == 2 and shape[0] == experts) or _NORM.search(name) is not None
        large = len(shape) in (2, 3) and prod(shape) >= LEAST_VALUES
        kept = bits == PLAIN_BITS or (self.keep != "" and re.search(self.keep, name) is not None)
        # bfloat16 has the range of all weights, and codes are chosen after it has rounded scales.
        numbers = "float16" if dtype == "float16" else "bfloat16"
        return None if kept or special or not large else GroupFormat(bits, self.group, numbers)

    @property
    def any(self) -> bool:
        """Whether anything may be quantized."""
        return min(self.weight_bits, self.head_bits) < PLAIN_BITS
