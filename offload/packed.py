"""Matrices in the order in which the processor's bfloat16 products read them, in memory of ours.

A product with a plain matrix reorders it first, every time. oneDNN can do that once, but keeps the
result in memory of its own; ours has a home on a tier, which is charged. So the reordered bytes are
copied over the plain ones, of which they have the number, and torch is told where they are, by the
C interface that it has for models compiled ahead of time.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import types
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload.slabs import Weight

logger = logging.getLogger(__name__)

_OPS = torch.ops.mkldnn


def pack(weight: Weight, data: torch.Tensor) -> bool:
    """Reorder a matrix at `data` (uint8 [nbytes]) in place and bind it to its linear module.

    False, and nothing is changed, where that cannot be done. While it reorders, oneDNN holds a
    second copy of the matrix.
    """
    if not (_is_matrix_of_one_linear(weight) and can_pack()):
        return False
    try:
        packed = pack_matrix(data.view(torch.bfloat16).view(weight.shape), data)
    except (RuntimeError, MemoryError) as error:  # it runs as well without, only slower
        logger.warning("weight %s is not reordered: %s", weight.name, error)
        return False
    if packed is None:
        return False
    parameter = torch.nn.Parameter(packed, requires_grad=False)
    parameter._home = data  # type: ignore[attr-defined]  # the memory has to outlive the pointer
    weight.bind(parameter)
    ((module, _),) = weight.users
    module.forward = types.MethodType(_forward, module)
    return True


def unpack(weights: Sequence[Weight]) -> None:
    """Leave the modules of packed `weights` as they were, without memory."""
    for weight in weights:
        weight.unbind()
        ((module, _),) = weight.users
        del module.forward


def _is_matrix_of_one_linear(weight: Weight) -> bool:
    if (weight.dtype, weight.expanded_bytes, len(weight.users)) != (torch.bfloat16, 0, 1):
        return False
    ((module, _),) = weight.users
    return type(module) is torch.nn.Linear and "forward" not in vars(module)


def _forward(module: torch.nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    out = _OPS._linear_pointwise(rows, module.weight, module.bias, "none", [], "")
    assert isinstance(out, torch.Tensor)
    return out


@functools.cache
def can_pack() -> bool:
    """Whether torch and this processor can: tried out, because the interface is not documented."""
    try:
        if not _OPS._is_mkldnn_bf16_supported():
            return False
        own = torch.Generator().manual_seed(0)  # the caller's random numbers stay what they are
        matrix = torch.randn(64, 32, generator=own).bfloat16()
        rows = torch.randn(3, 32, generator=own).bfloat16()
        room = torch.empty(matrix.nbytes, dtype=torch.uint8)  # has to outlive `packed`
        packed = pack_matrix(matrix, room)
        if packed is None:
            return False
        out = _OPS._linear_pointwise(rows, packed, None, "none", [], "")
        return torch.allclose(out, torch.nn.functional.linear(rows, matrix), rtol=0.02, atol=0.1)
    except (
        AttributeError,
        RuntimeError,
        OSError,
        TypeError,
        AssertionError,
        ctypes.ArgumentError,
    ):
        return False


def pack_matrix(matrix: torch.Tensor, room: torch.Tensor) -> torch.Tensor | None:
    """`matrix` (bfloat16 [outputs, inputs]) reordered into `room` (uint8 [nbytes], may be its own).

    None if it takes more room when reordered, as odd sizes do. The result does not own `room`.
    """
    reordered = _OPS._reorder_linear_weight(matrix)
    if _OPS._nbytes(reordered) != room.nbytes:
        return None
    described = _OPS._get_mkldnn_serialized_md(reordered)
    packed = _tensor_over(room, matrix.shape, described)
    # Last of all: until here nothing has changed, if anything fails.
    ctypes.memmove(room.data_ptr(), _OPS.data_ptr(reordered), room.nbytes)
    return packed


def _tensor_over(room: torch.Tensor, shape: torch.Size, described: torch.Tensor) -> torch.Tensor:
    library = _library()
    handle = ctypes.c_void_p()
    whole = ctypes.c_int64 * 2
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(room.data_ptr()),
        ctypes.c_int64(2),
        whole(*shape),
        whole(shape[1], 1),
        ctypes.c_int64(0),
        ctypes.c_int32(library.aoti_torch_dtype_bfloat16()),
        ctypes.c_int32(library.aoti_torch_device_type_cpu()),
        ctypes.c_int32(0),
        ctypes.byref(handle),
        ctypes.c_int32(library.aoti_torch_layout__mkldnn()),
        ctypes.c_void_p(described.data_ptr()),
        ctypes.c_int64(described.numel()),
    )
    if failed:
        raise RuntimeError("torch cannot make a tensor over reordered bytes")
    arguments = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
    make_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, *arguments)
    capsule = make_capsule(("PyCapsule_New", ctypes.pythonapi))(handle, None, None)
    interface: Any = torch._C._aoti
    tensor = interface.alloc_tensor_by_stealing_from_void_ptr(capsule)
    assert isinstance(tensor, torch.Tensor)
    return tensor


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__file__)  # it finds the functions in what it depends on
