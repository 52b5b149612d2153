"""Facts about what a model's experts add to its bytes."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from policy_search.model_shape import touched_share
from policy_search.named_models import NAMED_MODELS
from policy_search.shape_from_config import shape_from_config


@pytest.mark.parametrize(("experts", "each", "rows"), [(4, 2, 1), (4, 2, 3), (5, 1, 3), (3, 3, 2)])
def test_touched_experts_are_those_of_all_choices(experts, each, rows):
    """The mean over every way in which rows can choose, each as likely as the others."""
    ways = list(product(combinations(range(experts), each), repeat=rows))
    mean = sum(len(set().union(*way)) for way in ways) / len(ways)
    assert touched_share(experts, each, rows) * experts == pytest.approx(mean)


def test_products_read_the_experts_that_rows_visit():
    """One row reads the matrices that it meets, many rows all of them; a dense model's the same."""
    config = NAMED_MODELS["mixtral-8x7b"]
    shape = shape_from_config(config, "bfloat16")
    assert shape.matrix_bytes(1) == pytest.approx(shape.flops_per_row)  # two bytes a value
    layers = sum(tensor.nbytes for tensor in shape.tensors if 0 <= tensor.unit < shape.num_layers)
    assert shape.matrix_bytes(10_000) == pytest.approx(layers, rel=1e-4)  # norms are no matrices
    assert shape.matrix_bytes(2) - shape.matrix_bytes(1) == pytest.approx(
        (1 - 0.75**2 - 0.25) * shape.expert_bytes
    )
    dense = shape_from_config(NAMED_MODELS["llama-3-8b"], "bfloat16")
    assert dense.experts == 0
    assert dense.matrix_bytes(1) == dense.matrix_bytes(1000) == dense.flops_per_row
