"""A checkpoint in memory, and reading a prepared store back; child processes use them, too."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from offload.prepared import PreparedStore
from offload.prepared_layout import FOLDER
from offload.ram import map_memory
from offload.tiers import padded

KEY = "0123abcd"


@dataclass(frozen=True)
class Tensor:
    name: str
    values: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def spec(self) -> None:
        return None

    def stored(self, values: torch.Tensor) -> torch.Tensor:
        return values.contiguous().view(-1).view(torch.uint8)


class Source:
    """A checkpoint in memory; `reverse` gives the tensors of a unit in the other order."""

    def __init__(self, units: list[list[Tensor]], reverse: bool = False) -> None:
        self.tensors = {tensor.name: tensor for unit in units for tensor in unit}
        self.reverse = reverse
        self.loaded = 0

    def load(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in reversed(list(names)) if self.reverse else names:
            self.loaded += 1
            yield name, self.tensors[name].values


def make_units() -> list[list[Tensor]]:
    """The same tensors in every process: two units, an empty one, and a tiny last one."""
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return Tensor(name, torch.randn(shape, generator=generator).to(dtype))

    return [
        [tensor("table", 1000, 33), tensor("odd", 7, dtype=torch.bfloat16)],
        [tensor("a", 129, 65), tensor("scalar"), tensor("b", 513, 257, dtype=torch.bfloat16)],
        [],
        [tensor("norm", 3)],
    ]


def read(store: PreparedStore, name: str) -> torch.Tensor:
    """A tensor's bytes as a sweep reads them: whole blocks into aligned memory."""
    extent, block = store.extent(name), store.file.block
    start = extent.offset // block * block
    target = map_memory(padded(extent.offset + extent.nbytes, block) - start)
    extent.file.read(start, target)
    return target[extent.offset - start :][: extent.nbytes]


def as_bytes(tensor: Tensor) -> torch.Tensor:
    return tensor.values.contiguous().view(-1).view(torch.uint8)


def assert_holds(store: PreparedStore, units: list[list[Tensor]]) -> None:
    for tensor in (tensor for unit in units for tensor in unit):
        assert torch.equal(read(store, tensor.name), as_bytes(tensor)), tensor.name


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / FOLDER).iterdir())


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
