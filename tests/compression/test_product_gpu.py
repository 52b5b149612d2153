"""Products with packed matrices by the Triton kernel, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from compression import groupwise, product_gpu
from compression.spec import GroupFormat
from tests.flexrun.paged_batches import DEVICE, ON_GPU, require_triton

require_triton()

ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Of a result's size and 1; the interpreter cuts bits of bfloat16 off, twice."""


class Product:
    """One product with random values, and what it should give."""

    def __init__(self, draw: random.Random, spec: GroupFormat, dtype: torch.dtype) -> None:
        own = torch.Generator().manual_seed(draw.randrange(1 << 30))
        self.spec, self.dtype = spec, dtype
        self.rows, self.outputs = draw.randint(1, 17), draw.choice([1, 33, 130])
        columns = draw.choice([1, 2, 7, 9]) * spec.group
        values = torch.randn(self.outputs, columns, generator=own) / columns**0.5
        self.packed = groupwise.quantize_minmax(values, spec)
        wide = torch.randn(self.rows, columns + 3, generator=own).to(dtype)
        self.x = wide[:, :columns] if draw.random() < 0.5 else wide[:, :columns].contiguous()
        self.bias = torch.randn(self.outputs, generator=own).to(dtype)

    def expected(self, bias: torch.Tensor | None) -> torch.Tensor:
        """By plain operations in float32, with weights as they are rounded to the type of rows."""
        rounded = self.dtype if ON_GPU else torch.float32  # which the interpreter computes in
        matrix = groupwise.expand(self.packed, self.spec, self.x.shape[1], rounded).float()
        more = None if bias is None else bias.float()
        return torch.nn.functional.linear(self.x.float(), matrix, more)

    def found(self, bias: torch.Tensor | None, splits: int) -> torch.Tensor:
        nbytes = 4 * splits * self.rows * self.outputs
        room = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=DEVICE)
        there = self.x.to(DEVICE), self.packed.to(DEVICE), self.spec
        on_device = None if bias is None else bias.to(DEVICE)
        return product_gpu.multiply(*there, on_device, room, splits=splits).cpu()

    def error(self, bias: torch.Tensor | None, splits: int) -> float:
        expected, found = self.expected(bias), self.found(bias, splits)
        assert found.shape == expected.shape
        assert found.dtype == self.dtype
        return float(((found.float() - expected).abs() / (1 + expected.abs())).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_those_of_expanded_matrices(bits, group, dtype):
    """Of rows and outputs that fill no block, with and without bias, whole and in pieces."""
    draw = random.Random(bits + group)
    error = ERROR[dtype] if ON_GPU else 2 * ERROR[dtype]
    for numbers in ("bfloat16", "float16"):
        product = Product(draw, GroupFormat(bits, group, numbers), dtype)
        for bias, splits in itertools.product((None, product.bias), (1, 3)):
            assert product.error(bias, splits) < error


@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 33])
def test_any_number_of_rows(rows):
    """None at all, a block, and several."""
    product = Product(random.Random(rows), GroupFormat(4, 64), torch.float32)
    product.rows, product.x = rows, torch.randn(rows, product.x.shape[1])
    if not rows:
        assert product.found(None, 1).shape == (0, product.outputs)
    else:
        assert product.error(product.bias, 2) < ERROR[torch.float32]


def test_pieces_are_added_in_the_same_order():
    """The same bits every time, and in no more pieces than there is room for."""
    product = Product(random.Random(7), GroupFormat(4, 32), torch.float32)
    first = product.found(None, 3)
    assert all(torch.equal(product.found(None, 3), first) for _ in range(3))
    room = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    there = product.x.to(DEVICE), product.packed.to(DEVICE), product.spec, None, room
    found = product_gpu.multiply(*there, splits=3).cpu()
    torch.testing.assert_close(found, first, rtol=1e-5, atol=1e-5)


def test_formats_that_it_does_not_know():
    """Floats of 8 bits, and rows whose last group is short."""
    assert product_gpu.can_multiply(GroupFormat(4, 64), 128)
    assert not product_gpu.can_multiply(GroupFormat(4, 64), 130)
    assert not product_gpu.can_multiply(GroupFormat(8, 128, "float32"), 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", [GroupFormat(4, 64), GroupFormat(8, 128, "float16")], ids=str)
def test_its_trial_succeeds(spec, dtype):
    """With every type that is computed in."""
    assert product_gpu.works(spec, dtype, DEVICE)


def test_a_kernel_that_is_wrong_is_found_out(monkeypatch, caplog):
    """By its values, or by what it raises; each is said once."""
    spec, dtype = GroupFormat(4, 64), torch.float32
    right = product_gpu.multiply

    def fail(*_, **__):
        raise RuntimeError("no compiler")

    kernels = {
        "off by 0.2": lambda *args, **more: right(*args, **more) * 1.25,
        "off by nan": lambda *args, **more: right(*args, **more) * torch.nan,
        "no compiler": fail,
    }
    for message, kernel in kernels.items():
        monkeypatch.setattr(product_gpu, "multiply", kernel)
        product_gpu.works.cache_clear()
        assert not product_gpu.works(spec, dtype, DEVICE)
        assert not product_gpu.works(spec, dtype, DEVICE)
        assert caplog.text.count(message) == 1
    product_gpu.works.cache_clear()


@pytest.mark.parametrize("version", ["2.9.1", "3.2.0+git1"])
def test_compilers_that_would_end_the_process_are_not_asked(monkeypatch, caplog, version):
    """They are too old, which a warning says."""
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(product_gpu, "multiply", None)
    product_gpu.works.cache_clear()
    assert not product_gpu.works(GroupFormat(4, 64), torch.float32, DEVICE)
    product_gpu.works.cache_clear()
    assert "3.3 is the oldest" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 32])
@pytest.mark.parametrize("sizes", [(4096, 14336), (14335, 4096), (1000, 11008), (576, 1536)])
def test_real_sizes(sizes, rows):
    """In bfloat16, in pieces where outputs are few: the product of the expanded matrix."""
    outputs, columns = sizes
    made: dict[str, Any] = {
        "device": DEVICE,
        "generator": torch.Generator(DEVICE).manual_seed(rows),
    }
    spec, dtype = GroupFormat(4, 64), torch.bfloat16
    packed = groupwise.quantize_minmax(torch.randn(sizes, **made) / columns**0.5, spec)
    x = torch.randn(rows, columns, **made).to(dtype)
    room = torch.empty(2 * outputs * columns, dtype=torch.uint8, device=DEVICE)
    found = product_gpu.multiply(x, packed, spec, None, room)
    matrix = groupwise.expand(packed, spec, columns, dtype).float()
    expected = torch.nn.functional.linear(x.float(), matrix)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
