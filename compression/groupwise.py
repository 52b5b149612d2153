"""Group quantization in plain torch: what kernels are tested against, and where there is none.

Codes, scale and centre of a group are chosen together to make the sum of squared errors small. With
the codes known, scale and centre are a linear regression; with these known, codes are rounding. The
two steps are repeated from many ranges, cut at either end, because a narrow one has finer steps for
most values, at the cost of few; the best result is kept. It is k-means (Lloyd's algorithm) with
centroids at equal distances. It needs no data but the values.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from compression.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compression.spec import GroupFormat

METHOD = 1
"""Raise it when other bytes come out: what was quantized before is not used then."""
SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
"""Of a group's range below its mean, and of that above it: the search begins from all pairs. With 8
bits from the first: their steps are so fine that nothing is gained by making them finer. They are
at equal distances, which the kernel for GPUs counts on."""
EVERY = 2
"""Of these for keys and values, which others wait for: three times as fast, for 2 % more error."""
ROUNDS, POLISH = 2, 6
"""Of rounding and regression, from each pair, and more from the best of them."""
_EXPANDED_AT_A_TIME = 1 << 20
LARGEST = 1e18
"""Of a value: sums of squares are float32."""
FLOAT4 = tuple(sign * size for sign in (1, -1) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
"""What codes of 4 bits that are floats stand for."""
LEAST_SPREAD = 0.25
"""Of codes around their mean, squared and added up: below it they are all the same."""


def quantize(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """Pack `values` [rows, columns]: uint8 [rows, spec.row_bytes(columns)].

    Raises `QuantizationError` for values that are not finite or too large for the type of scales.
    """
    refuse_unusable(values)
    packed = quantize_any(values, spec, every=1)
    refuse_unbounded(packed, spec, values.shape[1])
    return packed


def quantize_any(values: torch.Tensor, spec: GroupFormat, every: int = EVERY) -> torch.Tensor:
    """The same without a look at the values, so that nothing waits for a device.

    The search begins from each pair of `every` so many `SHARES`.

    A group of which a value is not finite gets such a scale or centre, and so do some of those that
    `quantize` finds too large: nothing that it expands to is finite then.
    """
    groups, real = _in_groups(values.float(), spec)
    scale, centre = _rounded(*_fit(groups, real, spec, every), spec)
    codes = _codes(groups, scale, centre, spec).flatten(1)[:, : values.shape[1]]
    return pack(codes, scale, centre, spec)


def refuse_unusable(values: torch.Tensor) -> None:
    """Raise `QuantizationError` for NaN, infinities, and values whose squares are infinite."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not largest < LARGEST:
        raise QuantizationError("some values are infinite, not numbers, or too large")


def refuse_unbounded(packed: torch.Tensor, spec: GroupFormat, columns: int) -> None:
    """Raise `QuantizationError` for scales and centres of packed rows that are not finite."""
    stored = packed[:, spec.code_bytes(columns) :].contiguous()
    if not torch.isfinite(stored.view(getattr(torch, spec.numbers))).all():
        raise QuantizationError(f"some values are too large for scales of type {spec.numbers}")


def quantize_minmax(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """The same by rounding between each group's smallest and largest value: FlexGen's method."""
    groups, _ = _in_groups(values.float(), spec)
    scale, centre = _rounded(*_between(groups.amin(-1), groups.amax(-1), spec), spec)
    codes = _codes(groups, scale, centre, spec).flatten(1)[:, : values.shape[1]]
    return pack(codes, scale, centre, spec)


def _in_groups(values: torch.Tensor, spec: GroupFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [rows, groups, group], and which of [1, groups, group] are a row's and no padding.

    The last value is repeated where a group is short, so that its range stays what it is.
    """
    rows, columns = values.shape
    missing = spec.groups(columns) * spec.group - columns
    padded = torch.cat([values, values[:, -1:].expand(rows, missing)], dim=1)
    real = (torch.arange(padded.shape[1], device=values.device) < columns).to(padded)
    return padded.unflatten(1, (-1, spec.group)), real.view(1, -1, spec.group)


def _between(
    low: torch.Tensor, high: torch.Tensor, spec: GroupFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and centre whose codes reach from `low` to `high`."""
    scale = (high - low) / spec.most_code
    return scale, (low + high) / 2 + scale * (spec.zero_code - spec.most_code / 2)


def _codes(
    groups: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor, spec: GroupFormat
) -> torch.Tensor:
    """Of every value the code of the nearest number that has one; float32, of NaN it is NaN."""
    steps = torch.where(scale > 0, 1 / scale, 0)
    nearest = ((groups - centre[..., None]) * steps[..., None]).round()
    return (nearest + spec.zero_code).clamp(0, spec.most_code)


def _fit(
    groups: torch.Tensor, real: torch.Tensor, spec: GroupFormat, every: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and centre [rows, groups] of groups [rows, groups, group]."""
    count = real.sum(-1)
    mean = (groups * real).sum(-1) / count
    x = groups - mean[..., None]
    total, low, high = (x.square() * real).sum(-1), x.amin(-1), x.amax(-1)
    best, unknown = torch.full_like(total, torch.inf), torch.full_like(total, torch.nan)
    best_scale = best_centre = unknown  # and they stay so where no error is finite
    shares = SHARES[::every] if spec.bits == 4 else SHARES[:1]
    for below, above in itertools.product(shares, shares):
        first, last = below * low, above * high
        scale, centre = _between(first, last, spec)
        for _ in range(ROUNDS):
            scale, centre, error = _improved(x, real, scale, centre, total, spec)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_centre = torch.where(better, centre, best_centre)
    for _ in range(POLISH):
        best_scale, best_centre, _ = _improved(x, real, best_scale, best_centre, total, spec)
    return best_scale, best_centre + mean


def _improved(
    x: torch.Tensor,
    real: torch.Tensor,
    scale: torch.Tensor,
    centre: torch.Tensor,
    total: torch.Tensor,
    spec: GroupFormat,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and centre by regression on the codes that the old ones give, and the squared error.

    The old ones where all codes are the same. x has no mean; total: the sum of its squares.
    """
    codes = (_codes(x, scale, centre, spec) - spec.zero_code) * real
    mean = codes.sum(-1) / real.sum(-1)
    spread = codes.square().sum(-1) - mean * codes.sum(-1)
    products = (codes * x).sum(-1)
    slope = products / spread.clamp(min=LEAST_SPREAD)
    differ = spread > LEAST_SPREAD
    error = total - products * slope
    return torch.where(differ, slope, scale), torch.where(differ, -slope * mean, centre), error


def _rounded(
    scale: torch.Tensor, centre: torch.Tensor, spec: GroupFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = getattr(torch, spec.numbers)
    return scale.to(dtype).float(), centre.to(dtype).float()


def pack(
    codes: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor, spec: GroupFormat
) -> torch.Tensor:
    """Rows as they are stored: codes [rows, columns], scale and centre [rows, groups]."""
    numbers = torch.cat([scale, centre], dim=1).to(getattr(torch, spec.numbers))
    # Which integer a NaN becomes is not defined.
    return pack_floats(codes.nan_to_num(0.0).to(torch.uint8), numbers, spec)


def pack_floats(codes: torch.Tensor, numbers: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """The same from the bits of codes (uint8) and numbers as they are: scales [rows, groups]."""
    pieces: Sequence[torch.Tensor] = [codes]
    if spec.bits == 4:
        pieces = [_in_halves(each) for each in codes.split(spec.group, 1)]
    used = sum(piece.shape[1] for piece in pieces)
    gap = codes.new_zeros(len(codes), spec.code_bytes(codes.shape[1]) - used)
    return torch.cat([*pieces, gap, numbers.contiguous().view(torch.uint8)], dim=1)


def any_rows(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """Packed rows of any format, to try a kernel with; values [rows, columns] are about 1."""
    first = values[:, : spec.groups(values.shape[1])]
    if spec.float8:
        codes = values.to(torch.float8_e4m3fn).view(torch.uint8)
        return pack_floats(codes, first.abs() + 0.1, spec)
    if spec.float4:
        codes, scale = ((100 * each).int() for each in (values, first))
        return pack_floats((codes & 15).byte(), ((scale & 3) + 125).byte(), spec)
    return quantize_minmax(values, spec)


def _in_halves(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits of one group [rows, n] as [rows, ceil(n / 2)]."""
    half = -(-codes.shape[1] // 2)
    high = torch.nn.functional.pad(codes[:, half:], (0, 2 * half - codes.shape[1]))
    return codes[:, :half] | high << 4


def expand(
    packed: torch.Tensor, spec: GroupFormat, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Values [rows, columns] of type `dtype` from packed rows. Computed in float32."""
    if spec.float8 or spec.float4:
        return _expand_floats(packed, spec, columns).to(dtype)
    codes, scale, centre = unpack(packed, spec, columns)
    values = codes.float() - spec.zero_code
    each = [
        number.float().repeat_interleave(spec.group, 1)[:, :columns] for number in (scale, centre)
    ]
    return torch.addcmul(each[1], values, each[0]).to(dtype)


def _expand_floats(packed: torch.Tensor, spec: GroupFormat, columns: int) -> torch.Tensor:
    codes = _codes_of(packed, spec, columns)
    scale = packed[:, spec.code_bytes(columns) :].contiguous()
    if spec.float8:
        floats = codes.contiguous().view(torch.float8_e4m3fn).float()
        scale = scale.view(torch.float32)
    else:
        floats = codes.new_tensor(FLOAT4, dtype=torch.float32)[codes.int()]
        scale = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    return floats * scale.repeat_interleave(spec.group, 1)[:, :columns]


def expand_into(packed: torch.Tensor, spec: GroupFormat, out: torch.Tensor) -> None:
    """Fill `out` [rows, columns], few rows at a time: each value takes 40 bytes on the way."""
    step = max(1, _EXPANDED_AT_A_TIME // out.shape[1])
    for some, target in zip(packed.split(step), out.split(step)):
        target.copy_(expand(some, spec, out.shape[1], out.dtype))


def unpack(
    packed: torch.Tensor, spec: GroupFormat, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [rows, columns] (uint8), scales and centres [rows, groups] of packed rows."""
    stored, size = spec.code_bytes(columns), 2 * spec.groups(columns)
    numbers = getattr(torch, spec.numbers)
    scale = packed[:, stored : stored + size].contiguous().view(numbers)
    centre = packed[:, stored + size :].contiguous().view(numbers)
    return _codes_of(packed, spec, columns), scale, centre


def _codes_of(packed: torch.Tensor, spec: GroupFormat, columns: int) -> torch.Tensor:
    if spec.bits == 8:
        return packed[:, :columns]
    pieces, at = [], 0
    for start in range(0, columns, spec.group):
        count = min(spec.group, columns - start)
        half = -(-count // 2)
        both = packed[:, at : at + half]
        pieces += [both & 15, (both >> 4)[:, : count - half]]
        at += half
    return torch.cat(pieces, dim=1)
