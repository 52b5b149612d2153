"""Quantizing and expanding, by whichever code is fastest where the values are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from compression.spec import GroupFormat


def quantize(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """See `groupwise.quantize`; `values` are on the CPU. Raises `QuantizationError`."""
    from compression import cpu  # Numba takes a while to import

    return cpu.quantize(values, spec)


def quantize_unchecked(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """See `groupwise.quantize_any`; on the device of `values`, for which nothing waits."""
    if values.device.type == "cpu":
        from compression import cpu

        return cpu.quantize_unchecked(values, spec)
    from compression import gpu

    return gpu.quantize(values, spec)


def expand(packed: torch.Tensor, spec: GroupFormat, out: torch.Tensor) -> None:
    """Fill `out` [rows, columns] from rows [rows, bytes] that `quantize` gave; all contiguous."""
    if out.device.type == "cpu":
        from compression import cpu

        cpu.expand(packed, spec, out)
    else:
        from compression import gpu

        gpu.expand(packed, spec, out)
