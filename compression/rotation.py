"""Turns vectors, so that no few of their values are much larger than the others.

A group of few bits has one scale: a value that is ten times the others leaves few codes to them.
Some channels of keys are like that in every model. Multiplied by a Hadamard matrix, each value is
spread over all of the others (QuaRot, arXiv 2404.00456), and the products of two vectors that are
both turned stay what they were.
"""

from __future__ import annotations

import functools

import torch


def rotated(values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`values` [..., size] times a Hadamard matrix, in their own type or in `dtype`.

    The matrix is symmetric and its own inverse: turned twice, vectors are what they were, but for
    rounding. Where `size` is no power of two it has blocks of the largest one that divides it; so
    odd sizes stay as they are. Computed in float32.
    """
    size, dtype = values.shape[-1], dtype or values.dtype
    block = size & -size
    if block == 1:
        return values.to(dtype)
    matrix = _hadamard(block, values.device)
    blocks = values.float().reshape(-1, block)
    return torch.matmul(blocks, matrix).view(values.shape).to(dtype)


@functools.cache
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix of `size`, a power of two, whose rows are of length 1; float32."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / size**0.5).to(device)
