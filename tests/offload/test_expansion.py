"""Facts about what is expanded and what is multiplied packed: the choice, and the parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compression import groupwise, product_gpu
from compression.spec import GroupFormat
from offload import expansion, packed_matrix
from offload.expansion import MEASURED_ROWS, Expansion
from offload.packed_matrix import PackedMatrix
from offload.slabs import Weight

SPEC = GroupFormat(4, 64)


def make_weight(*shape: int, name: str = "w", spec: GroupFormat | None = SPEC) -> Weight:
    linear = torch.nn.Linear(shape[-1], shape[0], device="meta")
    users = ((linear, "weight"),)
    return Weight(name, torch.Size(shape), torch.bfloat16, users, torch.float32, spec)


def packed_bytes(weight: Weight) -> torch.Tensor:
    rows = torch.randn(weight.shape.numel() // weight.shape[-1], weight.shape[-1])
    return groupwise.quantize_minmax(rows, SPEC).view(-1)


def room_of(*weights: Weight) -> torch.Tensor:
    return torch.empty(sum(w.expanded_bytes for w in weights), dtype=torch.uint8)


@pytest.fixture
def plain_product(monkeypatch) -> list[int]:
    """Products by plain operations; the rows of each."""
    rows = []

    def multiply(x: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(len(x))
        return product_gpu.reference(x, *others[:-1])

    monkeypatch.setattr(packed_matrix, "multiply", multiply)
    return rows


def test_a_linear_module_multiplies_with_a_packed_matrix(plain_product):
    """Any shape of rows, with a bias: the product of the expanded matrix."""
    weight = make_weight(10, 128)
    ((linear, _),) = weight.users
    bias = linear._parameters["bias"] = torch.nn.Parameter(torch.randn(10), requires_grad=False)
    data = packed_bytes(weight)
    with torch.inference_mode():
        matrix = PackedMatrix(weight, data, room_of(weight))
        weight.bind(matrix)
        rows = torch.randn(2, 3, 128)
        found = linear(rows)
        assert linear(rows[:, :0]).shape == (2, 0, 10)
        expected = torch.nn.functional.linear(rows, weight.expand(data), bias)
    assert torch.equal(found, expected)
    assert type(found) is torch.Tensor
    assert plain_product == [6, 0]
    assert (matrix.shape, matrix.dtype) == (weight.shape, torch.float32)
    with pytest.raises(NotImplementedError, match="add"):
        _ = matrix + 1


def timed(weight: Weight, expanding: float, packed: float, expanded: float) -> Expansion:
    """As if both ways had been measured."""
    found = Expansion(room_of(weight), frozenset({"w"}))
    kind = expansion._kind(weight)
    found._expanding[kind] = expanding
    for rows in MEASURED_ROWS:
        found._times[kind, rows] = expansion._Product(packed * rows / 16, expanded)
    return found


def test_few_products_of_few_rows_are_packed():
    """As long as all of them take less time than expanding and the plain ones."""
    weight = make_weight(10, 128)
    found = timed(weight, expanding=6.0, packed=3.0, expanded=1.0)
    assert found.stays_packed(weight, [1])
    assert found.stays_packed(weight, [16, 3])
    assert not found.stays_packed(weight, [16, 3, 1]), "3 + 3 + 3 = 6 + 1 + 1 + 1"
    assert found.stays_packed(weight, [17]), "6 < 6 + 1"
    assert not found.stays_packed(weight, [17, 1])
    assert not found.stays_packed(weight, [33])
    assert not found.stays_packed(weight, []), "nobody knows"


def test_only_matrices_of_linear_modules_can_stay_packed():
    """Whole groups, codes that are integers, and no other use."""
    found = Expansion(torch.empty(0, dtype=torch.uint8), frozenset({"w"}))
    assert found.can_stay_packed(make_weight(10, 128))
    assert not found.can_stay_packed(make_weight(10, 128, name="other"))
    assert not found.can_stay_packed(make_weight(10, 128, spec=None))
    assert not found.can_stay_packed(make_weight(10, 130))
    assert not found.can_stay_packed(make_weight(2, 10, 128))
    assert not found.can_stay_packed(make_weight(10, 128, spec=GroupFormat(8, 128, "float32")))
    assert not found.stays_packed(make_weight(10, 128), [1]), "not before it was measured"


def test_both_ways_are_measured(plain_product, monkeypatch):
    """Every kind of matrix once, by products of as many rows as there may be."""
    weights = [make_weight(10, 128), make_weight(12, 64), make_weight(9, 130)]
    found = Expansion(room_of(*weights), frozenset({"w"}))
    calls = []

    def milliseconds(timed_calls: Any) -> list[float]:
        calls.append([call() for call in timed_calls])
        return [float(len(calls))] * len(timed_calls)

    monkeypatch.setattr(expansion, "_milliseconds", milliseconds)
    monkeypatch.setattr(expansion, "works", lambda *_: True)
    data = [(weight, packed_bytes(weight)) for weight in weights]
    for _ in range(2):
        found.measure(data, 20)
    assert plain_product == [16, 16, 20, 20]
    assert len(calls) == 1 + 2 * len(MEASURED_ROWS)
    kinds = [expansion._kind(weight) for weight in weights]
    assert list(found._expanding) == kinds[:2]
    assert found._times[kinds[0], 16] == expansion._Product(packed=3.0, expanded=2.0)
    assert found._times[kinds[1], 32] == expansion._Product(packed=5.0, expanded=4.0)


def test_a_kernel_that_does_not_work_is_not_used(plain_product, monkeypatch):
    """Nothing is measured, and everything is expanded."""
    weight = make_weight(10, 128)
    found = Expansion(room_of(weight), frozenset({"w"}))
    monkeypatch.setattr(expansion, "works", lambda *_: False)
    found.measure([(weight, packed_bytes(weight))], 16)
    found.bind([(weight, packed_bytes(weight))], [1])
    ((linear, _),) = weight.users
    assert type(linear.weight) is torch.nn.Parameter
    assert (found.expanded_bytes, plain_product) == (weight.expanded_bytes, [])
