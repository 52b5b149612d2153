"""What is known of attention so far: partial results over parts of the keys, merged exactly."""

from __future__ import annotations

from typing import TypeAlias

import torch

Rows: TypeAlias = "torch.Tensor | slice"


class AttentionState:
    """Results of n rows and H heads over the keys that were attended to so far.

    A part is its output, normalised over its own keys, and the log of the sum of their exponentials
    (lse); -inf where a row sees none of them. Weighted by exp(lse), outputs of disjoint parts add
    up to that over all of them (FlashInfer, section 3.1).
    """

    def __init__(self, rows: int, heads: int, dim: int, device: torch.device) -> None:
        self._shape = rows, heads, dim
        self._device = device
        self._seen = bytearray(rows)
        """Rows that may have a part; to merge into nothing would take five times the operations."""
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, rows: Rows, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge a part: out [some rows, H, V] of any type, and lse [some rows, H], float32.

        Sums are float32; the only part of all rows stays as it is.
        """
        if self._out is None or self._lse is None:
            if out.shape[0] == self._shape[0] and isinstance(rows, slice):
                self._out, self._lse = out, lse
                self._mark(rows)
                return
            self._out = torch.zeros(self._shape, device=self._device)
            self._lse = torch.full(self._shape[:2], -torch.inf, device=self._device)
        elif self._out.dtype != torch.float32:
            self._out = self._out.float()
        if self._mark(rows):
            out, lse = merge(self._out[rows], self._lse[rows], out, lse)
        self._out[rows], self._lse[rows] = out, lse

    @property
    def part(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Output [n, H, V] and log-sum-exp [n, H] of what was added; None if nothing was."""
        return None if self._out is None or self._lse is None else (self._out, self._lse)

    def _mark(self, rows: Rows) -> bool:
        """Note that `rows` have a part; whether some may have had one before."""
        # Which rows a tensor names is known on the device only.
        known = rows if isinstance(rows, slice) else slice(None)
        before = any(self._seen[known])
        self._seen[known] = bytes([1]) * len(self._seen[known])
        return before

    def finish(self, sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The result [n, H, V]. `sinks` [H] are logits that take probability and give nothing."""
        assert self._out is not None
        assert self._lse is not None
        out = self._out
        if sinks is not None:
            out = out * torch.sigmoid(self._lse - sinks.float()).unsqueeze(-1)
        return out.to(dtype)


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [..., V] and lse [...] over the keys of both parts."""
    both = torch.logaddexp(lse, other_lse)
    finite = both.clamp(min=torch.finfo(both.dtype).min)  # no key at all: weights of zero, not NaN
    weight = torch.exp(lse - finite).unsqueeze(-1)
    other_weight = torch.exp(other_lse - finite).unsqueeze(-1)
    return out * weight + other * other_weight, both
