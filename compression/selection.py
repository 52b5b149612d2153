"""What is quantized of a model's tensors and of its KV cache, and how (no torch)."""

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
KV_BITS = (PLAIN_BITS, 4)
LEAST_VALUES = 4096
"""Of a matrix that is worth it: smaller ones are a few kilobytes of a model."""


EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names that configs have for the experts of a layer."""
_NORM = re.compile(r"norm[^.]*\.[^.]*$|_norm$", re.IGNORECASE)
"""Norms of every head are matrices, too."""


def experts_of(config: Mapping[str, Any]) -> int:
    """Experts of a layer, by the names that a model's config.json has for them; 0 for none."""
    return next((int(config[name]) for name in EXPERT_COUNTS if config.get(name)), 0)


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
    kv_bits: int = PLAIN_BITS
    """Of keys and values in pages that are full."""

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
        return None if kept or special or not large else self._format(bits, dtype)

    def kv_groups(self, dtype: str) -> GroupFormat | None:
        """The format of keys and values that are computed as `dtype`; None if they stay like that.

        Full pages only: the first and the newest of every sequence are as they were computed.
        """
        return None if self.kv_bits == PLAIN_BITS else self._format(self.kv_bits, dtype)

    @property
    def any(self) -> bool:
        """Whether any weight may be quantized; the KV cache does not count."""
        return min(self.weight_bits, self.head_bits) < PLAIN_BITS

    def _format(self, bits: int, dtype: str) -> GroupFormat:
        # bfloat16 has the range of all values, and codes are chosen after it has rounded scales.
        return GroupFormat(bits, self.group, "float16" if dtype == "float16" else "bfloat16")
