"""Group quantization on a GPU: rows of codes are expanded where they have arrived."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch

from compression import groupwise

if TYPE_CHECKING:
    from compression.spec import GroupFormat

logger = logging.getLogger(__name__)

_GROUPS_PER_PROGRAM = 16


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
    blocks = triton.cdiv(spec.groups(columns), _GROUPS_PER_PROGRAM)
    expand_kernel[(rows, blocks)](
        packed,
        packed.view(-1).view(torch.int16 if spec.float8 else getattr(torch, spec.numbers)),
        out,
        columns,
        spec.row_bytes(columns),
        spec.code_bytes(columns),
        BITS=spec.bits,
        GROUP=spec.group,
        BLOCK=_GROUPS_PER_PROGRAM,
        WHOLE=columns % spec.group == 0,
        FLOAT8=spec.float8,
    )


@functools.cache
def _works(spec: GroupFormat, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel gives what plain operations give on this device; tried once.

    With a short last group, and with rows whose places are as the compiler likes them.
    """
    try:
        if all(_is_right(spec, dtype, device, more) for more in (10, 29 * spec.group)):
            return True
        logger.warning("the Triton kernel that expands weights gives wrong values here")
    except Exception as failure:  # whatever a compiler may raise
        logger.warning("the Triton kernel that expands weights does not run here: %s", failure)
    return False


def _is_right(spec: GroupFormat, dtype: torch.dtype, device: torch.device, more: int) -> bool:
    values = torch.randn(5, 3 * spec.group + more, generator=torch.Generator().manual_seed(0))
    packed = groupwise.any_rows(values, spec).to(device)
    expected = groupwise.expand(packed, spec, values.shape[1], dtype)
    found = torch.empty_like(expected)
    expand_with_triton(packed, spec, found)
    return torch.equal(found, expected)
