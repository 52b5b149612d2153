"""The Triton kernel that quantizes rows, by Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from compression import gpu, groupwise
from compression.spec import GroupFormat
from tests.flexrun.paged_batches import DEVICE, ON_GPU, require_triton

require_triton()


def draw(rows: int, columns: int) -> torch.Tensor:
    """Rows of different sizes, off zero, some with outliers."""
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(rows, columns, generator=generator)
    values[::3] = values[::3] ** 3
    sizes = torch.randn(rows, 1, generator=generator).exp() * 0.02
    return values * sizes + sizes * torch.randn(rows, 1, generator=generator)


def check(values: torch.Tensor, spec: GroupFormat) -> None:
    """As good as the reference's, mostly the same codes, and the same bytes around them."""
    packed = gpu.quantize_with_triton(values.to(DEVICE), spec).cpu()
    columns, expected = values.shape[1], groupwise.quantize_any(values, spec)
    assert packed.shape == expected.shape
    errors = [
        (groupwise.expand(each, spec, columns, torch.float32) - values.float()).square().sum()
        for each in (packed, expected)
    ]
    assert errors[0] <= errors[1] * 1.002 + 1e-12
    codes = [groupwise.unpack(each, spec, columns)[0] for each in (packed, expected)]
    assert (codes[0] != codes[1]).float().mean() < 0.05
    used = sum(
        -(-min(spec.group, columns - at) * spec.bits // 8) for at in range(0, columns, spec.group)
    )
    assert not packed[:, used : spec.code_bytes(columns)].any()


@pytest.mark.parametrize(
    ("bits", "group", "columns"),
    [(4, 64, 3), (4, 64, 64), (4, 64, 80), (4, 32, 61), (4, 128, 97), (8, 32, 129), (8, 128, 3)],
)
def test_rows_are_as_good_as_the_references(bits, group, columns):
    """Whole groups, short ones, odd ones, and a block of rows that is not full."""
    check(draw(19, columns), GroupFormat(bits, group))


@pytest.mark.parametrize("numbers", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_number_types(numbers, dtype):
    """Values of 16 bits, in rows that are parts of longer ones."""
    check(draw(5, 80).to(dtype)[:, 7:77], GroupFormat(4, 64, numbers))


def test_groups_of_one_value_are_exact():
    """Zeros, and constants that the 16 bits can hold."""
    values = torch.tensor([0.0, 1.0, -3.25, 2.0**-14, 240.0])[:, None].expand(-1, 35)
    spec = GroupFormat(4, 32)
    packed = gpu.quantize_with_triton(values.to(DEVICE), spec).cpu()
    assert torch.equal(groupwise.expand(packed, spec, 35, torch.float32), values)


def test_what_is_not_finite_stays_in_its_group():
    """All of its group becomes infinite or NaN, and nothing beside it."""
    spec, values = GroupFormat(4, 32), draw(7, 70)
    expected = groupwise.expand(groupwise.quantize_any(values, spec), spec, 70, torch.float32)
    bad = torch.full((2,), -1, dtype=torch.int32).view(torch.float32)
    values[1, 3], values[2, 40:42], values[4, 69] = torch.inf, bad, 3e38
    packed = gpu.quantize_with_triton(values.to(DEVICE), spec).cpu()
    found = groupwise.expand(packed, spec, 70, torch.float32)
    for row, group in ((1, slice(0, 32)), (2, slice(32, 64)), (4, slice(64, 70))):
        assert not found[row, group].isfinite().any()
        found[row, group] = expected[row, group]
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # NumPy's
def test_values_too_large_for_float16_are_not_finite():
    """Their scale or centre is infinite."""
    spec, values = GroupFormat(8, 64, "float16"), draw(2, 64) * 1e9
    packed = gpu.quantize_with_triton(values.to(DEVICE), spec).cpu()
    assert not groupwise.expand(packed, spec, 64, torch.float32).isfinite().any()


def test_shares_are_at_equal_distances():
    """The kernel counts on it."""
    steps = torch.tensor(groupwise.SHARES).diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps))
    assert groupwise.SHARES[0] == 1


@pytest.mark.parametrize("broken", ["raises", "wrong", "loses NaN"])
def test_a_kernel_that_fails_is_replaced(monkeypatch, caplog, broken):
    """By plain operations, with a warning: once, for each format."""
    spec, values = GroupFormat(4, 64), draw(3, 70)

    def kernel(values, spec):
        if broken == "raises":
            raise RuntimeError("no compiler")
        if broken == "wrong":
            return groupwise.quantize_minmax(values.nan_to_num(1.0), spec)
        return groupwise.quantize_any(values.nan_to_num(1.0), spec)

    monkeypatch.setattr(gpu, "quantize_with_triton", kernel)
    gpu._quantizes.cache_clear()
    for _ in range(2):
        assert torch.equal(gpu.quantize(values, spec), groupwise.quantize_any(values, spec))
    gpu._quantizes.cache_clear()
    assert caplog.text.count("Triton kernel that quantizes") == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # it is a prototype, it says
@pytest.mark.parametrize("columns", [64, 80, 96, 128, 256])
def test_gpu_quantizes_without_waiting(columns):
    """Many rows of real sizes; after the first call for a format nothing waits for the GPU."""
    assert ON_GPU
    for dtype in (torch.bfloat16, torch.float16):
        spec = GroupFormat(4, 64, str(dtype).removeprefix("torch."))
        values = draw(5000, columns).to(dtype)
        check(values, spec)
        there = values.to(DEVICE)
        gpu.quantize(there, spec)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gpu.quantize(there, spec)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert gpu._quantizes(spec, dtype, there.device)
