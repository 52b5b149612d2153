"""Facts about turned vectors: nothing is lost, products stay, and large values are spread."""

from __future__ import annotations

import pytest
import torch

from compression.rotation import rotated

SIZES = [1, 5, 6, 64, 80, 96, 128]
every_size = pytest.mark.parametrize("size", SIZES)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))


@every_size
def test_turned_twice_is_not_turned(size):
    """The matrix is its own inverse, whatever the shape and strides around the last axis."""
    for values in (draw(7, size), draw(2, 3, size).transpose(0, 1), draw(size), draw(0, size)):
        once = rotated(values)
        assert once.shape == values.shape
        torch.testing.assert_close(rotated(once), values, rtol=1e-5, atol=1e-5)


@every_size
def test_products_stay(size):
    """Of two vectors that are both turned."""
    queries, keys = draw(9, size), draw(33, size)
    torch.testing.assert_close(
        rotated(queries) @ rotated(keys).T, queries @ keys.T, rtol=1e-5, atol=2e-5
    )


@every_size
def test_a_large_value_is_spread_over_its_block(size):
    """Each of the block's values gets an equal share; odd sizes stay as they are."""
    block = size & -size
    for at in (0, size - 1):
        one = torch.zeros(size)
        one[at] = 1
        first = at // block * block
        found = rotated(one)
        torch.testing.assert_close(
            found[first : first + block].abs(), torch.full((block,), block**-0.5)
        )
        assert found.count_nonzero() == block


def test_types():
    """The result is of the input's type, or of the one that is asked for; sums are float32."""
    values = draw(4, 80)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        some = values.to(dtype)
        exact = rotated(some.float())
        assert torch.equal(rotated(some), exact.to(dtype))
        assert torch.equal(rotated(some, torch.float32), exact)
    assert rotated(draw(3, 5), torch.bfloat16).dtype == torch.bfloat16
