"""How many bytes groups take, exactly."""

from __future__ import annotations

import pytest
import torch

from compression.groupwise import quantize
from compression.spec import GroupFormat


@pytest.mark.parametrize(
    ("bits", "group", "expected"), [(4, 32, 5.0), (4, 64, 4.5), (4, 128, 4.25), (8, 64, 8.5)]
)
def test_bits_per_value(bits, group, expected):
    """Whole groups: the codes, and 32 bits for each group."""
    spec = GroupFormat(bits, group)
    assert spec.nbytes((7, 3, 1024)) * 8 / (7 * 3 * 1024) == expected


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 2, 3, 31, 64, 65, 80, 127, 130, 576])
def test_bytes_are_those_of_packed_rows(bits, columns):
    """Also where the last group is short, and of odd sizes; and rows are whole 16-bit numbers."""
    for group in (32, 64, 128):
        spec = GroupFormat(bits, group)
        packed = quantize(torch.randn(3, columns), spec)
        assert packed.shape == (3, spec.row_bytes(columns))
        assert packed.nbytes == spec.nbytes((3, columns))
        assert spec.row_bytes(columns) % 2 == 0


def test_other_formats_are_refused():
    """Three bits, or groups of 48."""
    for bits, group in ((3, 64), (4, 48)):
        with pytest.raises(ValueError, match="no format"):
            GroupFormat(bits, group)
