"""Matrices reordered in place: the same products, in the memory that was charged."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from offload import packed
from offload.packed import can_pack, pack, unpack
from offload.slabs import Weight


def cpu_flags() -> set[str]:
    """What the processor says it can; nothing where it does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


needs_packing = pytest.mark.skipif(
    not can_pack(), reason="this processor or torch cannot reorder bfloat16 matrices"
)


def linear_at(outputs: int, inputs: int, *, bias: bool) -> tuple[Weight, torch.Tensor]:
    """A linear module whose matrix lies in bytes of its own."""
    module = torch.nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    data = module.weight.detach().clone().view(-1).view(torch.uint8)
    weight = Weight("matrix", module.weight.shape, torch.bfloat16, ((module, "weight"),))
    weight.bind(weight.parameter(data))
    return weight, data


def module_of(weight: Weight) -> torch.nn.Linear:
    ((module, _),) = weight.users
    assert isinstance(module, torch.nn.Linear)
    return module


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 32), (192, 576), (1536, 576), (128, 64)])
@pytest.mark.parametrize("rows", [(1,), (7,), (1, 33), (2, 5), (300,)])
def test_same_product(shape: tuple[int, int], rows: tuple[int, ...], bias: bool) -> None:
    weight, data = linear_at(*shape, bias=bias)
    module, inputs = module_of(weight), torch.randn(*rows, shape[1]).bfloat16()
    with torch.inference_mode():
        expected = module(inputs)
        plain = data.clone()
        assert pack(weight, data)
        assert not torch.equal(data, plain)
        out = module(inputs)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@needs_packing
def test_lies_in_the_given_memory() -> None:
    weight, data = linear_at(192, 576, bias=False)
    assert pack(weight, data)
    bound = module_of(weight).weight
    assert bound.is_mkldnn
    assert torch.ops.mkldnn.data_ptr(bound) == data.data_ptr()
    assert torch.ops.mkldnn._nbytes(bound) == data.nbytes == 192 * 576 * 2
    unpack([weight])
    del bound
    gc.collect()
    assert data.shape == (192 * 576 * 2,)  # still ours


@needs_packing
def test_odd_sizes_stay_as_they_are() -> None:
    weight, data = linear_at(100, 66, bias=False)
    plain = module_of(weight).weight
    if torch.ops.mkldnn._nbytes(torch.ops.mkldnn._reorder_linear_weight(plain)) == plain.nbytes:
        pytest.skip("this processor reads such a matrix without padding")
    before = data.clone()
    assert not pack(weight, data)
    assert torch.equal(data, before)
    assert not module_of(weight).weight.is_mkldnn


@needs_packing
def test_only_plain_bfloat16_linears() -> None:
    class Scaled(torch.nn.Linear):
        """Does more than multiply."""

    weight, data = linear_at(64, 32, bias=False)
    module = Scaled(32, 64, bias=False, dtype=torch.bfloat16)
    other = Weight("matrix", weight.shape, torch.bfloat16, ((module, "weight"),))
    shared = Weight("matrix", weight.shape, torch.bfloat16, (*weight.users, *other.users))
    expanded = Weight("matrix", weight.shape, torch.bfloat16, weight.users, torch.float32)
    for each in (other, shared, expanded):
        assert not pack(each, data)


@needs_packing
def test_unpacked_modules_are_as_before() -> None:
    weight, data = linear_at(64, 32, bias=False)
    values, rows = data.clone(), torch.randn(3, 32).bfloat16()
    assert pack(weight, data)
    unpack([weight])
    assert module_of(weight).weight.is_meta
    weight.bind(weight.parameter(values))
    plain = torch.nn.functional.linear(rows, values.view(torch.bfloat16).view(64, 32))
    assert torch.equal(module_of(weight)(rows), plain)


@needs_packing
@pytest.mark.parametrize("broken", ["_reorder_linear_weight", "_get_mkldnn_serialized_md"])
def test_what_fails_half_way_changes_nothing(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, data = linear_at(64, 32, bias=False)
    before = data.clone()

    class Broken:
        def __getattr__(self, name: str) -> object:
            if name == broken:
                raise RuntimeError("no memory")
            return getattr(torch.ops.mkldnn, name)

    monkeypatch.setattr(packed, "_OPS", Broken())
    assert not pack(weight, data)
    assert torch.equal(data, before)
    module = module_of(weight)
    assert not module.weight.is_mkldnn
    assert "forward" not in vars(module)


@needs_packing
def test_a_forward_of_the_modules_own_is_kept() -> None:
    weight, data = linear_at(64, 32, bias=False)
    module = module_of(weight)
    vars(module)["forward"] = lambda rows: 2 * rows
    assert not pack(weight, data)


@needs_packing
def test_the_memory_lives_as_long_as_the_matrix() -> None:
    weight, data = linear_at(64, 32, bias=False)
    rows = torch.randn(3, 32).bfloat16()
    expected = module_of(weight)(rows)
    assert pack(weight, data)
    module, address = module_of(weight), data.data_ptr()
    del data, weight
    gc.collect()
    assert vars(module.weight)["_home"].data_ptr() == address
    torch.testing.assert_close(module(rows), expected, rtol=0.02, atol=0.02)


@pytest.mark.skipif(
    "avx512_bf16" not in cpu_flags(), reason="this processor does not multiply bfloat16"
)
def test_a_processor_that_can_is_known() -> None:
    """So that a newer torch cannot switch this off without anyone noticing."""
    assert can_pack()


def test_a_torch_without_the_interface_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("no such function")

    monkeypatch.setattr(packed, "pack_matrix", missing)
    can_pack.cache_clear()
    try:
        assert not can_pack()
        weight, data = linear_at(64, 32, bias=False)
        assert not pack(weight, data)
    finally:
        can_pack.cache_clear()
