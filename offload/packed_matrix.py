"""A matrix that a `torch.nn.Linear` multiplies rows with as it is packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from compression.product_gpu import multiply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload.slabs import Weight


class PackedMatrix(torch.nn.Parameter):
    """Has the shape and the type of the expanded matrix, and none of its values.

    Only `torch.nn.functional.linear` takes it, so it is for weights that have no other use.
    """

    _weight: Weight
    _packed: torch.Tensor
    _room: torch.Tensor

    def __new__(cls, weight: Weight, data: torch.Tensor, room: torch.Tensor) -> PackedMatrix:
        """`data` are the bytes of `weight`; `room`, for the time of a product, any others."""
        dtype = weight.compute_dtype or weight.dtype
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=dtype, device=data.device
        )
        made._weight, made._room = weight, room
        made._packed = data.view(len(made), -1)
        return made

    def __init__(self, *_: Any) -> None:
        """All is done: nothing of `torch.nn.Parameter` fits."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # questions about its shape and type
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{func} of a matrix that is packed")


def _linear(
    rows: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None
) -> torch.Tensor:
    spec = weight._weight.spec
    assert spec is not None
    flat = rows.reshape(-1, rows.shape[-1])
    out = multiply(flat, weight._packed, spec, bias, weight._room)
    return out.view(*rows.shape[:-1], out.shape[1])
