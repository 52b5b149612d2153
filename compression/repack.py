"""Matrices that come quantized, as rows of our format.

They are kept code by code; only places change. A centre is scale * (8 - zero), rounded to float16:
off by at most 2^-11 of itself, like the products of those who expand to float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compression.errors import QuantizationError
from compression.groupwise import pack, pack_floats
from compression.prequantized import USE_ANOTHER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compression.prequantized import Prequantized

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_NOT_A_NUMBER = 255
"""Of scales that are bytes."""


def rows(scheme: Prequantized, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A matrix as rows of `scheme.spec`: uint8 [..., outputs, row bytes].

    Raises `QuantizationError`.
    """
    if scheme.spec.float4:
        return _float4_rows(*(parts[name] for name in scheme.parts))
    if scheme.spec.float8:
        return _float8_rows(scheme, *(parts[name] for name in scheme.parts))
    codes, zeros, scale = _by_output(scheme, parts)
    outputs, inputs = codes.shape
    groups = scheme.spec.groups(inputs)
    if scale.shape != (outputs, groups) or zeros.shape != (outputs, groups):
        raise QuantizationError(
            f"scales of {tuple(scale.shape)} and zeros of {tuple(zeros.shape)} do not belong to "
            f"{groups} groups of {outputs} outputs"
        )
    scale = scale.float()
    centre = scale * (8 - (zeros + scheme.zero_offset).float())
    return pack(codes, scale, centre, scheme.spec)


def _float8_rows(scheme: Prequantized, floats: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    spec, (outputs, inputs) = scheme.spec, floats.shape
    if floats.dtype != torch.float8_e4m3fn:
        raise QuantizationError(f"codes of type {floats.dtype} are not supported", hint=USE_ANOTHER)
    if not (torch.isfinite(floats.float()).all() and torch.isfinite(scale.float()).all()):
        raise QuantizationError("some values are infinite or not numbers")
    groups = spec.groups(inputs)
    blocks = -(-outputs // spec.group), groups
    if scale.numel() == 1:
        scale = scale.view(1, 1)
    elif tuple(scale.shape) == blocks:
        scale = scale.repeat_interleave(spec.group, 0)[:outputs]
    elif tuple(scale.shape) != (outputs, 1):
        raise QuantizationError(
            f"scales of {tuple(scale.shape)} do not belong to {outputs} outputs of {inputs} inputs"
        )
    codes = floats.contiguous().view(torch.uint8)
    return pack_floats(codes, scale.float().expand(outputs, groups), spec)


def _float4_rows(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Of neighbours that share a byte, each shares one with the value half a group away."""
    if blocks.dtype != torch.uint8 or scale.dtype != torch.uint8:
        raise QuantizationError(
            f"codes of type {blocks.dtype} with scales of type {scale.dtype} are not supported",
            hint=USE_ANOTHER,
        )
    if scale.shape != blocks.shape[:-1]:
        raise QuantizationError(
            f"scales of {tuple(scale.shape)} do not belong to codes of {tuple(blocks.shape)}"
        )
    if (scale == _NOT_A_NUMBER).any():
        raise QuantizationError(f"some scales are not numbers ({_NOT_A_NUMBER})")
    experts, outputs, groups, stored = blocks.shape
    packed = blocks.new_empty(experts, outputs, groups * (stored + 1))
    packed[..., groups * stored :] = scale
    codes = packed[..., : groups * stored].unflatten(-1, (groups, stored))
    for mine, target in zip(blocks, codes):  # an expert at a time: together they may be gigabytes
        first, second = mine.chunk(2, -1)
        target[..., ::2] = first & 15 | second << 4
        target[..., 1::2] = first >> 4 | second & 0xF0
    return packed


def _by_output(
    scheme: Prequantized, parts: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [outputs, inputs], zeros and scales [outputs, groups]."""
    if scheme.method == "compressed-tensors":
        codes, scale = _unpacked(parts["weight_packed"]), parts["weight_scale"]
        _refuse_order(parts.get("weight_g_idx"), scheme.spec.group)
        if "weight_zero_point" in parts:
            return codes, _unpacked(parts["weight_zero_point"].T).T, scale
        return codes, torch.full(scale.shape, 8), scale
    if scheme.method == "gptq":
        _refuse_order(parts.get("g_idx"), scheme.spec.group)
        codes, zeros = _unpacked(parts["qweight"].T), _unpacked(parts["qzeros"]).T
    else:
        place = torch.tensor(_AWQ_ORDER).argsort()
        codes, zeros = (
            _unpacked(parts[name]).unflatten(1, (-1, 8))[..., place].flatten(1).T
            for name in ("qweight", "qzeros")
        )
    return codes, zeros, parts["scales"].T


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The eight codes of each int32, side by side along the last axis: uint8."""
    halves = packed.contiguous().view(torch.uint8)  # the lowest byte comes first
    return torch.stack([halves & 15, halves >> 4], dim=-1).flatten(-2)


def _refuse_order(group_of: torch.Tensor | None, group: int) -> None:
    if group_of is None or group_of.numel() == 0:
        return
    if not torch.equal(group_of.long(), torch.arange(len(group_of)) // group):
        raise QuantizationError(
            "its inputs are grouped out of order (desc_act, actorder)", hint=USE_ANOTHER
        )
