"""How products with packed matrices are cut into programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compression import product_gpu
from compression.product_gpu import plan_product
from compression.spec import GroupFormat


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """One of 100 multiprocessors."""
    monkeypatch.setattr(product_gpu, "_multiprocessors", lambda _: 100)
    plan_product.cache_clear()
    yield
    plan_product.cache_clear()


def grid(*sizes: int, dtype: torch.dtype = torch.bfloat16, room: int = 1 << 30, **more: Any):
    device = torch.device("cuda")
    return plan_product(sizes, GroupFormat(4, 64), dtype, device, room, **more).grid


def test_inputs_are_cut_where_outputs_do_not_fill_the_gpu():
    """Into pieces that do, of four steps of 128 inputs at least."""
    assert grid(1, 128 * 500, 4096) == (500, 1, 1)
    assert grid(1, 128 * 100, 4096) == (100, 1, 4)
    assert grid(16, 4096, 14336) == (32, 1, 12)
    assert grid(16, 1024, 4096) == (8, 1, 8)
    assert grid(33, 1024, 1024) == (8, 2, 2)
    assert grid(1, 1, 64) == (1, 1, 1)


def test_no_more_pieces_than_there_is_room_for():
    """Each has float32 sums; without room inputs stay in one piece."""
    assert grid(16, 1024, 4096, room=0) == (8, 1, 1)
    assert grid(16, 1024, 4096, room=3 * 4 * 16 * 1024) == (8, 1, 3)
    assert grid(16, 1024, 4096, room=4 * 4 * 16 * 1024 - 1, splits=4) == (8, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expanded_matrix_has_more_bytes_than_sums(dtype):
    """So the room that it would be expanded in never makes for fewer pieces."""
    for outputs, columns in ((64, 64), (576, 1536), (1024, 4096), (128256, 4096)):
        room = outputs * columns * dtype.itemsize
        for rows in (1, 16, 32):
            sizes = rows, outputs, columns
            assert grid(*sizes, dtype=dtype, room=room) == grid(*sizes, dtype=dtype)
