"""Floats of 8 bits, from their checkpoints' blocks to our rows and back."""

from __future__ import annotations

import pytest
import torch

from compression import cpu, groupwise
from compression.errors import QuantizationError
from compression.prequantized import prequantized
from compression.repack import rows

BLOCKS = prequantized({"quant_method": "fp8", "weight_block_size": [128, 128]})
OUTPUTS = prequantized({"quant_method": "compressed-tensors", "format": "float-quantized"})


def floats(outputs: int, inputs: int) -> torch.Tensor:
    """All codes that are numbers, zeros of both signs and the smallest ones among them."""
    codes = torch.arange(outputs * inputs).to(torch.uint8).view(outputs, inputs)
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes)
    return codes.view(torch.float8_e4m3fn)


def test_every_block_has_its_scale():
    """Also those at the edges, which are smaller."""
    matrix = floats(300, 200)
    scale = torch.rand(3, 2) + 0.5
    packed = rows(BLOCKS, {"weight": matrix, "weight_scale_inv": scale})
    found = groupwise.expand(packed, BLOCKS.spec, 200, torch.float32)
    for row in range(0, 300, 7):
        for column in range(0, 200, 3):
            expected = matrix[row, column].float() * scale[row // 128, column // 128]
            assert found[row, column] == expected
    assert packed.shape[1] == BLOCKS.spec.row_bytes(200) == 200 + 2 * 4


@pytest.mark.parametrize("shape", [(50, 1), (), (1,)])
def test_an_output_or_the_matrix_has_one_scale(shape):
    """The same for all of it."""
    matrix, scale = floats(50, 130), torch.rand(shape)
    packed = rows(OUTPUTS, {"weight": matrix, "weight_scale": scale})
    found = groupwise.expand(packed, OUTPUTS.spec, 130, torch.float32)
    assert torch.equal(found, matrix.float() * scale)


@pytest.mark.parametrize("columns", [1, 3, 127, 128, 130, 1000])
def test_the_kernel_expands_like_the_reference(columns):
    """The same bits in every type, from rows that begin at odd places, too."""
    packed = rows(OUTPUTS, {"weight": floats(37, columns), "weight_scale": torch.rand(37, 1)})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full((37, columns), torch.nan, dtype=dtype)
        cpu.expand(packed, OUTPUTS.spec, out)
        assert torch.equal(out, groupwise.expand(packed, OUTPUTS.spec, columns, dtype))


def test_what_cannot_be_right_is_refused():
    """NaN codes, scales of another matrix, other floats."""
    matrix, scale = floats(50, 130), torch.rand(50, 1)
    bad = matrix.view(torch.uint8).clone()
    bad[3, 4] = 0x7F
    for weight, scales, message in (
        (bad.view(torch.float8_e4m3fn), scale, "not numbers"),
        (matrix, torch.rand(49, 1), "do not belong to 50 outputs of 130"),
        (matrix.float().to(torch.float8_e5m2), scale, "float8_e5m2 are not supported"),
    ):
        with pytest.raises(QuantizationError, match=message):
            rows(OUTPUTS, {"weight": weight, "weight_scale": scales})
