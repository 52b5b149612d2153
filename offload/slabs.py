"""Weights, and how those of one unit lie next to each other in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from compression.errors import QuantizationError
from compression.expansion import expand, quantize
from offload.disk_layout import DiskPlace, lay_out
from offload.links import FileExtent
from offload.tiers import CACHE_LINE, padded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compression.spec import GroupFormat


@dataclass(frozen=True, slots=True)
class Weight:
    """One stored tensor and the module attributes that use it (several when it is tied)."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    """That it is stored and moved in."""
    users: tuple[tuple[torch.nn.Module, str], ...]
    compute_dtype: torch.dtype | None = None
    """That products are computed in; None: as stored."""
    spec: GroupFormat | None = None
    """Of a quantized one; `dtype` is then what it is quantized from."""

    @property
    def nbytes(self) -> int:
        """As stored."""
        if self.spec is not None:
            return self.spec.nbytes(self.shape)
        return self.shape.numel() * self.dtype.itemsize

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of the values as they are expanded, row after row; the model may see them turned."""
        return tuple(self.shape) if self.spec is None else self.spec.as_rows(self.shape)

    @property
    def expanded_bytes(self) -> int:
        """In the type that is computed in, padded; 0 where it is stored like that."""
        if self.spec is None and self.compute_dtype in (None, self.dtype):
            return 0
        itemsize = (self.compute_dtype or self.dtype).itemsize
        return padded(self.shape.numel() * itemsize, CACHE_LINE)

    def stored(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [shape] on the CPU as uint8 [nbytes]. Raises `QuantizationError`.

        Rows that are packed already, uint8, stay as they are.
        """
        if self.spec is None or values.dtype == torch.uint8:
            return values.contiguous().view(-1).view(torch.uint8)
        try:
            rows = values.reshape(-1, self.shape[-1])
            return quantize(rows, self.spec).view(-1)
        except QuantizationError as error:
            raise QuantizationError(
                f"{self.name} cannot be quantized: {error.message}",
                hint=f"check the checkpoint, or keep this tensor as it is: --keep '{self.name}'",
            ) from None

    def parameter(self, data: torch.Tensor) -> torch.nn.Parameter:
        """`data` (uint8 [nbytes]) seen as this tensor, which is not quantized."""
        return torch.nn.Parameter(data.view(self.dtype).view(self.shape), requires_grad=False)

    def expand(self, data: torch.Tensor, room: torch.Tensor | None = None) -> torch.nn.Parameter:
        """The parameter to compute with; `room` (uint8 [expanded_bytes]) takes its values."""
        if not self.expanded_bytes:
            return self.parameter(data)
        dtype = self.compute_dtype or self.dtype
        if room is None:
            expanded = torch.empty(self.row_shape, dtype=dtype, device=data.device)
        else:
            expanded = room[: self.shape.numel() * dtype.itemsize].view(dtype).view(self.row_shape)
        self.fill(expanded, data)
        if self.spec is not None and self.spec.turned:
            expanded = expanded.transpose(-1, -2)  # products read a matrix either way
        return torch.nn.Parameter(expanded, requires_grad=False)

    def fill(self, out: torch.Tensor, data: torch.Tensor) -> None:
        """Put values into `out`, whole rows of this tensor, from `data`, their bytes as stored."""
        if self.spec is None:
            out.copy_(data.view(self.dtype).view(out.shape))
        else:
            columns = self.row_shape[-1]
            packed = data.view(-1, self.spec.row_bytes(columns))
            expand(packed, self.spec, out.view(-1, columns))

    def bind(self, parameter: torch.nn.Parameter) -> None:
        """Make `parameter` what the modules compute with."""
        for module, attribute in self.users:
            module._parameters[attribute] = parameter

    def unbind(self) -> None:
        """Leave the modules a parameter without memory."""
        empty = torch.empty(self.shape, dtype=self.compute_dtype or self.dtype, device="meta")
        self.bind(torch.nn.Parameter(empty, requires_grad=False))


class DiskSource(Protocol):
    """Files that hold weights: a checkpoint read in place, or a prepared store."""

    def extent(self, name: str) -> FileExtent:
        """The bytes of weight `name`."""
        ...

    def check_unchanged(self) -> None:
        """Raise `OffloadStoreError` if a file is not what it was when it was opened."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


@dataclass(slots=True)
class Slab:
    """Weights laid out one after another in one buffer."""

    weights: list[Weight]
    offsets: list[int] = field(default_factory=list)
    nbytes: int = 0

    def __post_init__(self) -> None:
        for weight in self.weights:
            self.offsets.append(self.nbytes)
            self.nbytes += padded(weight.nbytes, CACHE_LINE)

    def views(self, data: torch.Tensor) -> Iterable[tuple[Weight, torch.Tensor]]:
        """Each weight with its bytes in `data` (uint8 [nbytes])."""
        for weight, offset in zip(self.weights, self.offsets):
            yield weight, data[offset : offset + weight.nbytes]


class DiskSlab:
    """Weights in a buffer as they lie on disk; see `lay_out`."""

    def __init__(
        self, weights: list[Weight], extents: Mapping[str, FileExtent], *, shifted: bool = False
    ) -> None:
        found = [extents[weight.name] for weight in weights]
        files = {str(extent.file.path): extent.file for extent in found}
        layout = lay_out(
            [DiskPlace(str(e.file.path), e.offset, e.nbytes, e.file.block) for e in found],
            shifted=shifted,
        )
        self.weights = weights
        self.nbytes = layout.nbytes
        self._offsets = layout.offsets
        self.segments = [
            (FileExtent(files[s.file], s.offset, s.nbytes), s.at, s.padding)
            for s in layout.segments
        ]
        """What to read, where in the slab it goes, and the bytes of it that are no weights."""

    def views(self, data: torch.Tensor) -> Iterable[tuple[Weight, torch.Tensor]]:
        """Each weight with its bytes in `data` (uint8 [nbytes])."""
        for weight, offset in zip(self.weights, self._offsets):
            yield weight, data[offset : offset + weight.nbytes]
