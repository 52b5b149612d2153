"""Seconds of the operations that a sweep consists of on the device (no torch).

Products with matrices take as long as their operations or as reading the matrices, whatever takes
longer (the roofline model, Williams, 2009), or as was measured for so many rows. Attention of
single rows reads all their sequences' keys and values and is bound by that; of many rows of a
sequence it is bound by operations. Vidur (MLSys 2024) prices batches by operators in the same way.
Where the model's own layers were measured, they take what they took there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from policy_search.model_shape import touched_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from policy_search.hardware import Hardware
    from policy_search.model_shape import ModelShape


def compute_seconds(shape: ModelShape, hardware: Hardware, rows: float, positions: float) -> float:
    """Of many `rows` that attend to `positions` keys, each row's counted, on average."""
    flops = rows * shape.flops_per_row + positions * shape.attention_flops
    return flops / hardware.flops


def layer_seconds(
    shape: ModelShape, hardware: Hardware, rows: float, batches: int, in_place: float = 0.0
) -> float:
    """Of `rows` in so many micro-batches, attention apart; each reads the matrices once more.

    A part `in_place` of the weights stays where it is computed with.
    """
    if not rows:
        return 0.0
    each = rows / batches
    if hardware.profile is not None:
        least = shape.flops_per_row / hardware.flops
        return batches * hardware.profile.layer_seconds(each, in_place, least)
    flops = rows * shape.flops_per_row
    if hardware.products:
        of_experts = rows * shape.expert_flops_per_row
        seconds = (flops - of_experts) / _rate(hardware.products, each)
        if of_experts:
            # Each expert that is touched multiplies the rows that visit it.
            visited = shape.experts * touched_share(shape.experts, shape.experts_per_row, each)
            meets = each * shape.experts_per_row / visited
            seconds += of_experts / _rate(hardware.products, meets)
        return seconds
    reading = batches * shape.matrix_bytes(each) / hardware.matrix_read
    return max(flops / hardware.flops, reading)


def attention_seconds(
    shape: ModelShape, hardware: Hardware, read: float, read_bytes: float, positions: float
) -> float:
    """Of single rows that attend to `read` positions in sum, `read_bytes` of keys and values, and
    of prompts' rows that attend to `positions`.
    """
    flops = shape.attention_flops
    many = hardware.attention_flops if hardware.attention_flops < math.inf else hardware.flops
    single = max(read * flops / hardware.flops, read_bytes / hardware.device_attention)
    return single + positions * flops / many


def head_seconds(
    shape: ModelShape, hardware: Hardware, rows: float, batches: int, in_place: float = 0.0
) -> float:
    """Of the output head for `rows` that need logits; every micro-batch has at least one.

    A part `in_place` of it stays where it is computed with.
    """
    if not batches:
        return 0.0
    each = max(1.0, rows / batches)
    if hardware.profile is not None and hardware.profile.head:
        least = shape.head_flops_per_row / hardware.flops
        return batches * hardware.profile.head_seconds(each, in_place, least)
    flops = each * shape.head_flops_per_row
    if hardware.products:
        return batches * flops / _rate(hardware.products, each)
    matrix = shape.head_flops_per_row // 2 * shape.value_bytes
    return batches * max(flops / hardware.flops, matrix / hardware.matrix_read)


def program_seconds(hardware: Hardware, batches: int) -> float:
    """In which the device waits for the program, in a sweep."""
    profile = hardware.profile
    return 0.0 if profile is None or not batches else profile.around + batches * profile.program


def expansion_seconds(shape: ModelShape, hardware: Hardware) -> float:
    """Of the device in every sweep, whatever its rows: weights become what is computed with."""
    return shape.expanded_in_sweep / hardware.expansion


def _rate(points: Sequence[tuple[int, float]], rows: float) -> float:
    """Operations per second with `rows`: in proportion to them below the first point."""
    first, rate = points[0]
    if rows <= first:
        return rate * rows / first
    for (less, slow), (more, fast) in zip(points, points[1:]):  # noqa: RUF007  # few points
        if rows <= more:
            # Seconds of a product are linear in between.
            low, high = less / slow, more / fast
            return rows / (low + (high - low) * (rows - less) / (more - less))
    return points[-1][1]
