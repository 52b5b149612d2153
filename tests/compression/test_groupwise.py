"""Quantized groups: near the best that codes can do, and the kernel like the reference."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from compression import cpu, groupwise
from compression.errors import QuantizationError
from compression.spec import GroupFormat

SPECS = [GroupFormat(4, 32), GroupFormat(4, 64), GroupFormat(4, 128), GroupFormat(8, 64)]
COLUMNS = [1, 3, 31, 64, 80, 127, 576, 1000]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
every_size = pytest.mark.parametrize("columns", COLUMNS)
both_numbers = pytest.mark.parametrize("numbers", ["bfloat16", "float16"])


def draw(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of different sizes, off zero, some with outliers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values[::3] = values[::3] ** 3
    sizes = torch.randn(rows, 1, generator=generator).exp() * 0.02
    return values * sizes + sizes * torch.randn(rows, 1, generator=generator)


def expanded(packed, spec, columns):
    """Float32, by the reference."""
    return groupwise.expand(packed, spec, columns, torch.float32)


def squared_error(values, packed, spec):
    """Over everything, in float64."""
    return (expanded(packed, spec, values.shape[1]).double() - values).square().sum()


def minmax_twin(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """Rounding between the ends of each group's range, one group at a time, in float64."""
    result = torch.empty(values.shape, dtype=torch.float64)
    for row, start in itertools.product(range(len(values)), range(0, values.shape[1], spec.group)):
        group = values[row, start : start + spec.group].double()
        step = (group.max() - group.min()) / spec.most_code
        codes = ((group - group.min()) / step).round() if step > 0 else torch.zeros_like(group)
        result[row, start : start + spec.group] = group.min() + codes * step
    return result


@every_spec
@every_size
def test_the_kernel_expands_like_the_reference(spec, columns):
    """The same bits, in every type and for either type of scale."""
    values = draw(37, columns)
    for numbers in ("bfloat16", "float16"):
        spec = replace(spec, numbers=numbers)
        packed = groupwise.quantize(values, spec)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.full(values.shape, torch.nan, dtype=dtype)
            cpu.expand(packed, spec, out)
            expected = groupwise.expand(packed, spec, columns, dtype)
            assert torch.equal(out, expected)


@every_spec
@every_size
@both_numbers
def test_the_kernel_quantizes_like_the_reference(spec, columns, numbers):
    """As well, and almost always with the same codes: sums are added up in another order."""
    values, spec = draw(37, columns), replace(spec, numbers=numbers)
    mine, theirs = cpu.quantize(values, spec), groupwise.quantize(values, spec)
    ours, reference = (squared_error(values, each, spec) for each in (mine, theirs))
    assert ours <= reference * 1.002 + 1e-12
    codes = [groupwise.unpack(each, spec, columns)[0] for each in (mine, theirs)]
    assert (codes[0] != codes[1]).float().mean() < 0.05


@every_spec
def test_better_than_rounding_between_the_ends(spec):
    """Over all groups; and that rounding itself is as a loop over groups does it."""
    values, spec = draw(64, 576), replace(spec, numbers="float16")
    packed = cpu.quantize(values, spec)
    simple = groupwise.quantize_minmax(values, spec)
    twin = (minmax_twin(values, spec) - values).square().sum()
    assert squared_error(values, simple, spec) == pytest.approx(float(twin), rel=0.03)
    assert squared_error(values, packed, spec) < 0.8 * twin


def test_a_search_over_all_ranges_finds_nothing_better():
    """A brute force over scales and centres of small groups: 2 % on average, a third at worst."""
    spec = GroupFormat(4, 32, "float16")
    values = draw(60, 32, seed=3)
    ratios = []
    packed = cpu.quantize(values, spec)
    found = (expanded(packed, spec, 32) - values).square().sum(1)
    for row, error in zip(values.double(), found):
        low, high = row.min(), row.max()
        scales = torch.linspace(0.55, 1.02, 95, dtype=torch.float64) * (high - low) / 15
        offsets = torch.linspace(-1, 1, 161, dtype=torch.float64)
        centres = (low + high) / 2 + offsets * (high - low) / 8
        s, c = scales[:, None, None], centres[None, :, None]
        codes = ((row - c) / s).round().clamp(-8, 7)
        best = (row - c - s * codes).square().sum(-1).min()
        ratios.append(float(error / best))
    assert sum(ratios) / len(ratios) < 1.02
    assert max(ratios) < 1.35


@both_numbers
def test_groups_of_one_value_are_exact(numbers):
    """Zeros, and constants that the 16 bits can hold; also a single value in a row."""
    spec = GroupFormat(4, 64, numbers)
    constants = torch.tensor([0.0, -0.0, 1.0, -3.25, 2.0**-14, 240.0])
    for columns in (1, 64, 70):
        values = constants[:, None].expand(-1, columns)
        packed = cpu.quantize(values, spec)
        assert torch.equal(expanded(packed, spec, columns), values)
        assert torch.equal(packed, groupwise.quantize(values, spec))


@every_spec
def test_two_values_are_nearly_exact(spec):
    """Two of the codes are enough for them, so only scale and centre are rounded."""
    values = torch.where(torch.arange(640) % 3 == 0, 0.3, -0.7).view(1, -1)
    spec = replace(spec, numbers="float16")
    for quantize in (cpu.quantize, groupwise.quantize):
        off = expanded(quantize(values, spec), spec, 640) - values
        assert off.abs().max() < 2e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quantize", [cpu.quantize, groupwise.quantize])
def test_values_that_are_not_numbers_are_refused(quantize, bad):
    """Wherever they are."""
    for at in (0, 63, 64, 99):
        values = draw(5, 100)
        values[2, at] = bad
        with pytest.raises(QuantizationError, match="infinite"):
            quantize(values, GroupFormat())


@pytest.mark.parametrize("quantize", [cpu.quantize, groupwise.quantize])
def test_values_whose_squares_are_infinite_are_refused(quantize):
    """No error of theirs could be told from another."""
    values = draw(5, 128)
    values[1, 70] = 3e19
    with pytest.raises(QuantizationError, match="too large"):
        quantize(values, GroupFormat())


def test_plain_operations_expand_a_few_rows_at_a_time(monkeypatch):
    """The same values; a whole matrix would take many times its size."""
    spec, values = GroupFormat(), draw(37, 130)
    packed = groupwise.quantize(values, spec)
    monkeypatch.setattr(groupwise, "_EXPANDED_AT_A_TIME", 1000)
    out = torch.empty(37, 130)
    groupwise.expand_into(packed, spec, out)
    assert torch.equal(out, expanded(packed, spec, 130))


@pytest.mark.parametrize("quantize", [cpu.quantize, groupwise.quantize])
def test_values_beyond_float16_are_refused(quantize):
    """They would become infinite scales."""
    values = draw(5, 128)
    values[1, 70] = 3e6
    quantize(values, GroupFormat())  # bfloat16 can hold them
    with pytest.raises(QuantizationError, match="too large for"):
        quantize(values, GroupFormat(numbers="float16"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_values_give_the_same_bytes(dtype):
    """Whatever type they come in, with one thread or two."""
    values = draw(300, 1000).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(cpu.quantize(values, GroupFormat()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(found[0], cpu.quantize(values.float(), GroupFormat()))
