"""Floats of 4 bits: what transformers makes of their blocks, in as many bytes."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from compression import cpu, groupwise
from compression.errors import QuantizationError
from compression.prequantized import prequantized
from compression.repack import rows
from compression.spec import GroupFormat

SCHEME = prequantized({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
SPEC = SCHEME.spec


def every_block() -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of codes with all scales that are numbers: [3, 85, 16, 16] and [3, 85, 16]."""
    codes = torch.arange(256).byte().view(16, 16).expand(3, 85, 16, 16)
    scales = torch.arange(255).byte().view(3, 85, 1).expand(3, 85, 16)
    return codes.contiguous(), scales.contiguous()


def packed_rows() -> torch.Tensor:
    codes, scales = every_block()
    return rows(SCHEME, {"blocks": codes, "scales": scales})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_those_of_transformers(dtype):
    """The same bits for every code and scale, zeros of both signs and subnormal numbers too."""
    expected = convert_moe_packed_tensors(*every_block(), dtype=dtype).transpose(1, 2)
    found = groupwise.expand(packed_rows().flatten(0, 1), SPEC, 512, dtype).view(expected.shape)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(found.view(bits), expected.contiguous().view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_kernel_expands_like_the_reference(dtype):
    """Every code and scale, in every type."""
    packed = packed_rows().flatten(0, 1)
    out = torch.full((255, 512), torch.nan, dtype=dtype)
    cpu.expand(packed, SPEC, out)
    expected = groupwise.expand(packed, SPEC, 512, dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(bits), expected.view(bits))


@pytest.mark.parametrize("columns", [1, 3, 31, 32, 64, 70, 96, 1000, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_any_length(columns, dtype):
    """Rows of odd numbers of bytes, and a last group that is short."""
    packed = groupwise.any_rows(torch.randn(37, columns), SPEC)
    assert packed.shape == (37, SPEC.row_bytes(columns))
    out = torch.full((37, columns), torch.nan, dtype=dtype)
    cpu.expand(packed, SPEC, out)
    assert torch.equal(out, groupwise.expand(packed, SPEC, columns, dtype))


def test_bytes_are_those_of_the_checkpoint():
    """16 for the codes of 32 values and one for their scale; rows are the model's columns."""
    codes, scales = every_block()
    shape = SCHEME.shape(codes.shape)
    assert shape == (3, 512, 85)
    assert SPEC.packed_shape(shape) == packed_rows().shape == (3, 85, 16 * 17)
    assert SPEC.nbytes(shape) == codes.nbytes + scales.nbytes == 3 * 512 * 85 * 17 // 32


def test_other_groups_are_refused():
    """There is no MXFP4 with groups of 64, nor with codes of 8 bits."""
    for bits, group in ((4, 64), (8, 32)):
        with pytest.raises(ValueError, match="no format"):
            GroupFormat(bits, group, "e8m0")


def test_what_cannot_be_right_is_refused():
    """Scales that are no numbers, or of another matrix; codes of another type or shape."""
    codes, scales = every_block()
    for blocks, of_blocks, message in (
        (codes, scales.clone().fill_(255), "not numbers"),
        (codes, scales[:, :, 1:], r"\(3, 85, 15\) do not belong to codes of \(3, 85, 16, 16\)"),
        (codes.int(), scales, "codes of type torch.int32"),
    ):
        with pytest.raises(QuantizationError, match=message):
            rows(SCHEME, {"blocks": blocks, "scales": of_blocks})
    for shape in ((3, 85, 256), (3, 85, 16, 8), (85, 512)):
        with pytest.raises(QuantizationError, match="codes have the shape"):
            SCHEME.shape(shape)
    with pytest.raises(QuantizationError, match="experts has 100 inputs, which is no whole"):
        SCHEME.check("experts", (3, 100, 85))
