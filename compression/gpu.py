"""Group quantization on a GPU: rows are expanded where they have arrived, or are made there."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch

from compression import groupwise

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compression.spec import GroupFormat

logger = logging.getLogger(__name__)

_GROUPS_PER_PROGRAM = 16
_ROWS_PER_PROGRAM = 16
"""Whose groups are searched together: a thread has few of their values then, in registers."""


def expand(packed: torch.Tensor, spec: GroupFormat, out: torch.Tensor) -> None:
    """Fill `out` [rows, columns] from packed rows on the same device; both are contiguous."""
    if _works(spec, out.dtype, out.device):
        expand_with_triton(packed, spec, out)
    else:
        groupwise.expand_into(packed, spec, out)


def expand_with_triton(packed: torch.Tensor, spec: GroupFormat, out: torch.Tensor) -> None:
    """The same by the kernel."""
    import triton

    from compression.kernels_gpu import expand_kernel

    rows, columns = out.shape
    numbers = packed.view(-1)
    if not spec.float4:
        numbers = numbers.view(torch.int16 if spec.float8 else getattr(torch, spec.numbers))
    blocks = triton.cdiv(spec.groups(columns), _GROUPS_PER_PROGRAM)
    expand_kernel[(rows, blocks)](
        packed,
        numbers,
        out,
        columns,
        spec.row_bytes(columns),
        spec.code_bytes(columns),
        BITS=spec.bits,
        GROUP=spec.group,
        BLOCK=_GROUPS_PER_PROGRAM,
        WHOLE=columns % spec.group == 0,
        FLOAT8=spec.float8,
        FLOAT4=spec.float4,
    )


@functools.cache
def _works(spec: GroupFormat, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel gives what plain operations give on this device; tried once.

    With a short last group, and with rows whose places are as the compiler likes them.
    """
    checks = (_is_right(spec, dtype, device, more) for more in (10, 29 * spec.group))
    return _passes("expands weights", checks)


def _passes(what: str, checks: Iterable[bool]) -> bool:
    """Whether the kernel that does `what` passes all `checks`; says so where it does not."""
    try:
        if all(checks):
            return True
        logger.warning("the Triton kernel that %s gives wrong values here", what)
    except Exception as failure:  # whatever a compiler may raise
        logger.warning("the Triton kernel that %s does not run here: %s", what, failure)
    return False


def _is_right(spec: GroupFormat, dtype: torch.dtype, device: torch.device, more: int) -> bool:
    values = torch.randn(5, 3 * spec.group + more, generator=torch.Generator().manual_seed(0))
    packed = groupwise.any_rows(values, spec).to(device)
    expected = groupwise.expand(packed, spec, values.shape[1], dtype)
    found = torch.empty_like(expected)
    expand_with_triton(packed, spec, found)
    return torch.equal(found, expected)


def quantize(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """See `groupwise.quantize_any`; the first call for a format tries the kernel, and waits."""
    if _quantizes(spec, values.dtype, values.device):
        return quantize_with_triton(values, spec)
    return groupwise.quantize_any(values, spec)


def quantize_with_triton(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """The same by the kernel."""
    import triton

    from compression.kernels_gpu import quantize_kernel

    rows, columns = values.shape
    values = values if values.stride(1) == 1 else values.contiguous()
    size = rows, spec.row_bytes(columns)
    packed = torch.empty(size, dtype=torch.uint8, device=values.device)
    shares = groupwise.SHARES[:: groupwise.EVERY] if spec.bits == 4 else groupwise.SHARES[:1]
    if rows:
        quantize_kernel[(triton.cdiv(rows, _ROWS_PER_PROGRAM), spec.groups(columns))](
            values,
            packed,
            packed.view(-1).view(torch.int16),
            rows,
            columns,
            values.stride(0),
            spec.row_bytes(columns),
            spec.code_bytes(columns),
            BITS=spec.bits,
            GROUP=spec.group,
            HALF=spec.numbers == "float16",
            BLOCK=_ROWS_PER_PROGRAM,
            SHARES=len(shares),
            SHARE_STEP=groupwise.SHARES[0] - groupwise.SHARES[groupwise.EVERY],
            ROUNDS=groupwise.ROUNDS,
            POLISH=groupwise.POLISH,
            LEAST_SPREAD=groupwise.LEAST_SPREAD,
        )
    return packed


@functools.cache
def _quantizes(spec: GroupFormat, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel's codes are as good as the reference's on this device; tried once."""
    checks = (_is_as_good(spec, dtype, device, more) for more in (0, 10))
    return _passes("quantizes keys and values", checks)


def _is_as_good(spec: GroupFormat, dtype: torch.dtype, device: torch.device, more: int) -> bool:
    """By squared errors: sums in another order may give other codes, and as good ones.

    And a value that is not a number must not be lost.
    """
    shape = 2 * _ROWS_PER_PROGRAM + 5, 2 * spec.group + more
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, 1] = torch.nan
    errors = []
    for quantized in (quantize_with_triton(values.to(device), spec).cpu(), None):
        packed = groupwise.quantize_any(values, spec) if quantized is None else quantized
        off = groupwise.expand(packed, spec, shape[1], torch.float32) - values.float()
        if not off[0, : spec.group].isnan().all() or not off[0, spec.group :].isfinite().all():
            return False
        errors.append(float(off[1:].square().sum()))
    return errors[0] <= 1.002 * errors[1]
