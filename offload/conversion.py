"""How some tensors of a model are made from tensors of a checkpoint."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from offload.errors import CheckpointError
from offload.packed_tensor import PackedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

    from compression.spec import GroupFormat
    from offload.safetensors_file import StoredTensor

_COMPARE_BYTES = 16 * 2**20


@dataclass(slots=True)
class Conversion:
    """How some tensors of the model are made from tensors of the checkpoint."""

    target: str
    """The model's name for the result (the first one, where there are several)."""
    converter: WeightConverter | None
    """Description by transformers; None where the checkpoint has the tensor as it is."""
    sources: list[tuple[str, StoredTensor | PackedTensor]] = field(default_factory=list)
    """With the converter's pattern that each one matched."""
    provides: dict[str, str] = field(default_factory=dict)
    """Names in the model (tied ones too) and which result each one is."""

    def run(self, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Read the sources, cast them to `dtype`, convert them; the results by target name."""
        if self.converter is None:
            return {self.target: self.sources[0][1].read()}
        converter: Any = deepcopy(self.converter)  # it collects tensors
        for pattern, stored in self.sources:
            converter.add_tensor(self.target, stored.key, pattern, partial(_read_as, stored, dtype))
        try:
            made = converter.convert(self.target, model=model, config=model.config)
        except CheckpointError:
            raise
        except Exception as error:  # the operations are transformers' and promise no exception type
            raise CheckpointError(
                f"cannot convert {len(self.sources)} tensors like {self.sources[0][1].key} "
                f"to {self.target}: {error}",
                hint="check that config.json belongs to this checkpoint",
            ) from error
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    @property
    def spec(self) -> GroupFormat | None:
        """The format of the results, if the sources come quantized. Raises `CheckpointError`."""
        formats = {s.spec if isinstance(s, PackedTensor) else None for _, s in self.sources}
        if len(formats) > 1:
            raise CheckpointError(
                f"{self.target} is made from tensors of which some are quantized and some are not",
                hint="use an unquantized checkpoint of this model",
            )
        return formats.pop()

    @property
    def targets(self) -> list[str]:
        """Names of all results."""
        if self.converter is None:
            return [self.target]
        patterns = self.converter.target_patterns
        return [self.target.replace(patterns[0], pattern) for pattern in patterns]

    def has_same_bytes(self, other: Conversion) -> bool:
        """Whether both take a tensor as it is, and the two are equal."""
        a, b = self.sources[0][1], other.sources[0][1]
        if isinstance(a, PackedTensor) or isinstance(b, PackedTensor):
            return False
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return all(
            torch.equal(a.read(start, _COMPARE_BYTES), b.read(start, _COMPARE_BYTES))
            for start in range(0, a.nbytes, _COMPARE_BYTES)
        )


def _read_as(stored: StoredTensor | PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    return stored.read() if isinstance(stored, PackedTensor) else stored.read().to(dtype)
