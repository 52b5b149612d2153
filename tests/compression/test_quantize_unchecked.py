"""Quantizing without a look at the values: as with one, and what is not finite stays like that."""

from __future__ import annotations

import pytest
import torch

from compression import cpu, groupwise
from compression.expansion import quantize, quantize_unchecked
from compression.spec import GroupFormat

BAD = [float("nan"), -float("inf"), 3e38]
SPECS = [GroupFormat(4, 64), GroupFormat(4, 32, "float16"), GroupFormat(8, 128)]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
both_ways = pytest.mark.parametrize("way", [cpu.quantize_unchecked, groupwise.quantize_any])


def draw(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite_values_give_the_same_bytes(spec, dtype):
    """In every type, from a view of something wider, and of no rows at all."""
    wide = draw(37, 200).to(dtype)
    for values in (wide, wide[:, 7:137], wide[:0]):
        expected = quantize_unchecked(values.float().contiguous(), spec)
        assert torch.equal(quantize_unchecked(values, spec), expected)
    assert torch.equal(groupwise.quantize_any(wide, spec, 1), groupwise.quantize(wide, spec))


@both_ways
@every_spec
def test_a_shorter_search_costs_little(way, spec):
    """A few percent of the squared error, where there is a search."""
    values = draw(300, 192)
    errors = [
        (groupwise.expand(each, spec, 192, torch.float32) - values).square().sum()
        for each in (way(values, spec), quantize(values, spec))
    ]
    assert errors[0] <= 1.05 * errors[1]


@both_ways
@every_spec
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_stays_in_its_group(way, spec, bad):
    """All of its group becomes infinite or NaN, and nothing beside it."""
    clean = draw(18, 200)
    expected = groupwise.expand(way(clean, spec), spec, 200, torch.float32)
    for at in (0, 199):
        values = clean.clone()
        values[17, at] = bad
        found = groupwise.expand(way(values, spec), spec, 200, torch.float32)
        first = at // spec.group * spec.group
        assert not found[17, first : first + spec.group].isfinite().any()
        found[17, first : first + spec.group] = expected[17, first : first + spec.group]
        assert torch.equal(found, expected)


@both_ways
def test_no_payload_of_a_nan_is_rounded_to_a_number(way):
    """A carry out of its low bits would make zero of it."""
    values = torch.full((16, 64), -1, dtype=torch.int32).view(torch.float32)
    for some in (values, values.abs(), values.bfloat16()):
        for spec in SPECS:
            assert groupwise.expand(way(some, spec), spec, 64, torch.float32).isnan().all()


@both_ways
def test_values_too_large_for_float16_are_not_finite(way):
    """Their scale or centre is infinite."""
    values, spec = draw(3, 64) * 1e7, GroupFormat(4, 64, "float16")
    assert not groupwise.expand(way(values, spec), spec, 64, torch.float32).isfinite().any()
