"""The Triton kernel that expands rows of codes, by Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from compression import gpu, groupwise
from compression.spec import GroupFormat
from tests.flexrun.paged_batches import DEVICE, ON_GPU, require_triton

require_triton()


@pytest.mark.parametrize("numbers", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("columns", [3, 64, 80, 127, 128 * 17 + 50])
def test_rows_are_those_of_the_reference(bits, group, columns, numbers):
    """The same bits."""
    spec = GroupFormat(bits, group, numbers)
    values = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    packed = groupwise.quantize_minmax(values, spec)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = groupwise.expand(packed, spec, columns, dtype)
        out = torch.full(values.shape, torch.nan, dtype=dtype, device=DEVICE)
        gpu.expand_with_triton(packed.to(DEVICE), spec, out)
        if dtype == torch.bfloat16 and not ON_GPU:  # the interpreter cuts bits off
            torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("spec", [GroupFormat(8, 128, "float32"), GroupFormat(4, 32, "e8m0")])
@pytest.mark.parametrize("columns", [3, 96, 127, 128, 128 * 17 + 50])
def test_floats_of_few_bits(columns, spec):
    """With a scale of 32 bits for each group, or of 8: rows may have an odd number of bytes."""
    values = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    packed = groupwise.any_rows(values, spec)
    out = torch.full(values.shape, torch.nan, device=DEVICE)
    gpu.expand_with_triton(packed.to(DEVICE), spec, out)
    assert torch.equal(out.cpu(), groupwise.expand(packed, spec, columns, torch.float32))


def test_every_power_of_two():
    """Whose products with codes are numbers; the smallest is not normal."""
    spec = GroupFormat(4, 32, "e8m0")
    codes = torch.arange(16).repeat(2).byte().expand(253, 32)
    packed = groupwise.pack_floats(codes, torch.arange(253).byte().view(-1, 1), spec)
    out = torch.full((253, 32), torch.nan, device=DEVICE)
    gpu.expand_with_triton(packed.to(DEVICE), spec, out)
    assert torch.equal(out.cpu(), groupwise.expand(packed, spec, 32, torch.float32))


def test_a_kernel_that_fails_is_replaced(monkeypatch, caplog):
    """By plain operations, with a warning: once, for each format."""
    spec = GroupFormat(4, 64)
    values = torch.randn(3, 130)
    packed = groupwise.quantize_minmax(values, spec)
    expected = groupwise.expand(packed, spec, 130, torch.float32)

    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu, "expand_with_triton", fail)
    gpu._works.cache_clear()
    for _ in range(2):
        out = torch.empty(values.shape)
        gpu.expand(packed, spec, out)
        assert torch.equal(out, expected)
    gpu._works.cache_clear()
    assert caplog.text.count("no compiler") == 1
