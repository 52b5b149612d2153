"""Products of few rows with matrices that stay packed on a GPU.

Reading codes is a third and less of what expanding them, and reading 16 bits for each, takes. It
has to be done again for every product, and for many rows making values is more work than that.
"""

from __future__ import annotations

import functools
import logging
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import torch

from compression import groupwise

if TYPE_CHECKING:
    from compression.spec import GroupFormat

logger = logging.getLogger(__name__)

MOST_ROWS = 32
"""For which the kernel is meant: it computes any number, so many at a time."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of a result's size and 1: more than twice what rounding it takes."""
_LEAST_ROWS = 16
"""Of a product of matrices in registers; missing ones are zeros."""
_PROGRAMS = 4
"""That a multiprocessor has at a time: fewer of them leave it waiting for memory."""
_LEAST_STEPS = 4
"""Of one program: less would not fill its pipeline."""


class _Plan(NamedTuple):
    """How a product is cut."""

    grid: tuple[int, int, int]
    """Programs: blocks of outputs, blocks of rows, pieces of inputs."""
    steps: int
    """Of each program, over its inputs."""
    constants: dict[str, int]
    """What the kernel is compiled for."""


def can_multiply(spec: GroupFormat, columns: int) -> bool:
    """Whether the kernel knows the format: codes are integers, and all groups of a row are whole.

    Of a short group the halves of bytes would be other columns.
    """
    return not (spec.float8 or spec.float4) and columns % spec.group == 0


def multiply(
    x: torch.Tensor,
    packed: torch.Tensor,
    spec: GroupFormat,
    bias: torch.Tensor | None,
    room: torch.Tensor,
    *,
    splits: int | None = None,
) -> torch.Tensor:
    """x [rows, inputs] times packed rows [outputs, row bytes]: [rows, outputs], plus `bias`.

    Where outputs alone would not fill the GPU, inputs are cut into pieces, whose sums wait in
    `room` (uint8 [any]) until they are added up: as many pieces as it has room for, or `splits`.
    The order of additions depends on sizes and the GPU only.
    """
    from compression.product_kernels_gpu import INTERPRETED, product_kernel, sum_kernel

    rows, outputs, columns = len(x), len(packed), x.shape[1]
    out = x.new_empty(rows, outputs)
    if not rows:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    plan = plan_product((rows, outputs, columns), spec, x.dtype, x.device, room.nbytes, splits)
    constants, parts, has_bias = plan.constants, plan.grid[2], bias is not None
    sums = out if parts == 1 else room[: 4 * parts * rows * outputs].view(torch.float32)
    product_kernel[plan.grid](
        x,
        packed,
        packed.view(-1).view(getattr(torch, spec.numbers)),
        bias,
        sums,
        rows,
        outputs,
        plan.steps,
        x.stride(0),
        spec.groups(columns) // constants["GROUPS_BY"],
        spec.row_bytes(columns) // constants["ROW_BY"],
        spec.code_bytes(columns),
        **constants,
        BIAS=has_bias and parts == 1,
        UPCAST=INTERPRETED,  # it takes products of bfloat16 for those of integers
    )
    if parts > 1:
        sum_kernel[(rows, -(-outputs // 256))](
            sums, bias, out, rows, outputs, PARTS=parts, BLOCK=256, BIAS=has_bias
        )
    return out


@functools.cache
def plan_product(
    sizes: tuple[int, int, int],
    spec: GroupFormat,
    dtype: torch.dtype,
    device: torch.device,
    room: int,
    splits: int | None = None,
) -> _Plan:
    """For `sizes` (rows, outputs, inputs) and so many bytes of `room`.

    A program takes 64 neighbouring bytes of a row, or more, in each step, and as many rows as
    registers and shared memory have room for; and, if so, two groups: of each row two scales are
    the least that is asked for ahead of time.
    """
    rows, outputs, columns = sizes
    block_m = _LEAST_ROWS if rows <= _LEAST_ROWS else MOST_ROWS
    block_n = 32 if dtype == torch.float32 else 128
    of_group = spec.group * spec.bits // 8
    block_g = max(2 if of_group <= 64 and dtype != torch.float32 else 1, 64 // of_group)
    groups = spec.groups(columns)
    steps = -(-groups // block_g)
    blocks = -(-outputs // block_n), -(-rows // block_m)
    if splits is None:  # to fill the GPU
        programs = _PROGRAMS * _multiprocessors(device)
        splits = min(programs // (blocks[0] * blocks[1]), steps // _LEAST_STEPS)
    each = -(-steps // max(1, min(splits, room // (4 * rows * outputs))))
    constants = {
        "BITS": spec.bits,
        "GROUP": spec.group,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_G": block_g,
        "GROUPS_BY": gcd(groups, 8),
        "ROW_BY": gcd(spec.row_bytes(columns), 16),
    }
    return _Plan((*blocks, -(-steps // each)), each, constants)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # Triton's interpreter
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def reference(
    x: torch.Tensor, packed: torch.Tensor, spec: GroupFormat, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same by plain operations."""
    matrix = groupwise.expand(packed, spec, x.shape[1], x.dtype)
    return torch.nn.functional.linear(x, matrix, bias)


@functools.cache
def works(spec: GroupFormat, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel gives what plain operations give on this device; tried once.

    With few rows and many, whole and in pieces, outputs that fill no block, and with rows of codes
    whose places are as the compiler likes them, and not. Says why not in a warning.
    """
    try:
        _refuse_old_triton()
        for rows, splits, groups in ((3, 1, 23), (3, 3, 32), (MOST_ROWS, 1, 32)):
            error = _largest_error(spec, dtype, device, (rows, splits, groups))
            if not error <= TOLERANCE[dtype]:  # nor if it is not a number
                logger.warning("the Triton kernel that multiplies codes is off by %.2g", error)
                return False
    except Exception as failure:  # whatever a compiler may raise
        logger.warning("the Triton kernel that multiplies codes does not run here: %s", failure)
        return False
    return True


def _refuse_old_triton() -> None:
    import triton

    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    if version < (3, 3):  # it would not raise, but end the process
        raise RuntimeError("Triton 3.3 is the oldest that compiles it")


def _largest_error(
    spec: GroupFormat, dtype: torch.dtype, device: torch.device, sizes: tuple[int, int, int]
) -> float:
    """Against products in float32 with the same weights, as they are rounded to `dtype`.

    `sizes`: rows, pieces, groups.
    """
    rows, splits, groups = sizes
    outputs, columns = 200, groups * spec.group
    own = torch.Generator().manual_seed(0)
    values = torch.randn(outputs, columns, generator=own) / columns**0.5
    packed = groupwise.any_rows(values, spec)
    x, bias = (
        torch.randn(*size, generator=own).to(dtype) for size in ((rows, columns), (outputs,))
    )
    matrix = groupwise.expand(packed, spec, columns, dtype).float()
    expected = torch.nn.functional.linear(x.float(), matrix, bias.float())
    room = torch.empty(4 * splits * rows * outputs, dtype=torch.uint8, device=device)
    there = x.to(device), packed.to(device), spec, bias.to(device), room
    found = multiply(*there, splits=splits)
    return float(((found.cpu().float() - expected).abs() / (1 + expected.abs())).max())
