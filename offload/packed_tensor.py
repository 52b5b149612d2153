"""Matrices of a checkpoint that come quantized: several stored tensors that are one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compression.errors import QuantizationError
from compression.repack import rows
from offload.errors import CheckpointError
from offload.safetensors_file import DOWNLOAD_AGAIN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from compression.prequantized import Prequantized
    from compression.spec import GroupFormat
    from offload.safetensors_file import StoredTensor


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """To be read like a `StoredTensor`, as rows of bytes."""

    key: str
    """As the matrix would be called if it were not quantized."""
    scheme: Prequantized
    parts: Mapping[str, StoredTensor]

    @property
    def spec(self) -> GroupFormat:
        """The format of the rows."""
        return self.scheme.spec

    @property
    def path(self) -> Path:
        """Of the file with the codes."""
        return self.parts[self.scheme.codes].path

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """In the model. Raises `CheckpointError`."""
        try:
            return self.scheme.shape(self.parts[self.scheme.codes].shape)
        except QuantizationError as error:
            raise self._unusable(error.message, error.hint) from None

    def rows_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the rows of `name`, which has `shape` in the model.

        Raises `CheckpointError` if no codes can stand for it.
        """
        try:
            self.scheme.check(name, shape)
        except QuantizationError as error:
            raise CheckpointError(f"{self.path}: {error.message}", error.hint) from None
        return self.spec.packed_shape(shape)

    def is_usable_as(self, dtype: torch.dtype) -> bool:
        """Never: places change."""
        return False

    def read(self) -> torch.Tensor:
        """uint8 [..., outputs, row bytes]. Raises `CheckpointError`."""
        try:
            return rows(self.scheme, {name: part.read() for name, part in self.parts.items()})
        except QuantizationError as error:
            raise self._unusable(error.message, error.hint) from None
        except KeyError as error:
            raise self._unusable(f"{error.args[0]} is missing") from None

    def _unusable(self, reason: str, hint: str | None = None) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {self.key} cannot be used: {reason}", hint or DOWNLOAD_AGAIN
        )


def join_parts(
    stored: Iterable[StoredTensor], scheme: Prequantized | None
) -> list[StoredTensor | PackedTensor]:
    """The same tensors, with those that are parts of one joined."""
    if scheme is None:
        return list(stored)
    parts: dict[str, dict[str, StoredTensor]] = {}
    others: list[StoredTensor | PackedTensor] = []
    for tensor in stored:
        found = scheme.part_of(tensor.key, str(tensor.dtype))
        if found is None:
            others.append(tensor)
        else:
            parts.setdefault(found[0], {})[found[1]] = tensor
    whole = [PackedTensor(key, scheme, each) for key, each in parts.items() if scheme.codes in each]
    return [*others, *whole]
