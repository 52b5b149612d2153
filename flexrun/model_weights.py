"""A model's parameters as weights: which unit uses each, and how it is stored."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from compression.selection import Quantization, experts_of
from flexrun.errors import UsageError
from offload.slabs import Weight

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compression.spec import GroupFormat
    from flexrun.model import Model

NOTHING_QUANTIZED = Quantization()


@dataclass(slots=True)
class ModelWeights:
    """Every stored tensor of a model, by the unit that uses it."""

    layers: list[list[Weight]]
    head: list[Weight]
    embedding: Weight
    tied: bool
    """The head uses the embedding table."""
    resident: list[Weight]
    """Small ones outside all units: the final norm, a position table."""

    @property
    def placeable(self) -> list[tuple[int, Weight]]:
        """Weights with the unit they are used in; the embedding table, if it is its own, is -1."""
        units = [*self.layers, self.head]
        own = [] if self.tied else [(-1, self.embedding)]
        return own + [(number, weight) for number, unit in enumerate(units) for weight in unit]

    @property
    def units(self) -> list[list[Weight]]:
        """All of them, in the order that they are used in and lie on disk."""
        own = [] if self.tied else [self.embedding]
        return [[*self.resident, *own], *self.layers, self.head]

    @property
    def most_expanded(self) -> Weight | None:
        """The largest one of those that are stored in another form than they are computed with."""
        largest = max(self.all, key=lambda weight: weight.expanded_bytes)
        return largest if largest.expanded_bytes else None

    @property
    def quantized(self) -> bool:
        """Whether some are; then all are read from a prepared store."""
        return any(weight.spec is not None for weight in self.all)

    @property
    def all(self) -> list[Weight]:
        return [*self.resident, *(weight for _, weight in self.placeable)]


def find_weights(
    model: Model,
    quantization: Quantization = NOTHING_QUANTIZED,
    packed: Mapping[str, GroupFormat] = MappingProxyType({}),
) -> ModelWeights:
    """Sort a model's parameters by the unit that uses them; a tied tensor is one weight.

    `packed`: formats of those that the checkpoint has quantized already.
    """
    weights: dict[int, Weight] = {}
    units: dict[int, int] = {}
    layer_of = {
        submodule: number
        for number, layer in enumerate(model.layers)
        for submodule in layer.modules()
    }
    head_modules = set(model.head.modules())
    for module_name, module in model.module.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{module_name}.{attribute}" if module_name else attribute
            known = weights.get(id(parameter))
            users = ((module, attribute),) if known is None else (*known.users, (module, attribute))
            first = name if known is None else known.name
            stored = model.stored_dtypes[first]
            weights[id(parameter)] = Weight(first, parameter.shape, stored, users, parameter.dtype)
            number = len(model.layers) if module in head_modules else layer_of.get(module, -2)
            units[id(parameter)] = max(number, units.get(id(parameter), -2))
    for key, weight in weights.items():
        spec = packed.get(weight.name) or _spec_of(weight, units[key], model, quantization)
        weights[key] = replace(weight, spec=spec)
    _check_keep(weights.values(), quantization)
    table = model.embedding.weight
    assert isinstance(table, torch.Tensor)
    embedding = weights[id(table)]
    tied = units[id(table)] == len(model.layers)
    grouped: list[list[Weight]] = [[] for _ in range(len(model.layers) + 1)]
    resident = []
    for key, weight in weights.items():
        if units[key] >= 0:
            grouped[units[key]].append(weight)
        elif weight is not embedding:
            resident.append(weight)
    return ModelWeights(grouped[:-1], grouped[-1], embedding, tied, resident)


def _check_keep(weights: Iterable[Weight], quantization: Quantization) -> None:
    if not (quantization.any and quantization.keep):
        return
    names = [weight.name for weight in weights]
    if not any(re.search(quantization.keep, name) for name in names):
        matrices = [w.name for w in weights if w.spec is not None]
        raise UsageError(
            f"--keep {quantization.keep!r} is found in no tensor's name",
            hint=f"names are like {', '.join(matrices[:2] + matrices[-1:])}",
        )


def _spec_of(
    weight: Weight, unit: int, model: Model, quantization: Quantization
) -> GroupFormat | None:
    in_layer = 0 <= unit < len(model.layers)
    table = any(module is model.embedding for module, _ in weight.users)
    if not weight.dtype.is_floating_point or not (in_layer or unit == len(model.layers) or table):
        return None
    experts = experts_of(model.config.get_text_config().to_dict())
    dtype = str(weight.dtype).removeprefix("torch.")
    return quantization.of(weight.name, weight.shape, dtype, in_layer=in_layer, experts=experts)
