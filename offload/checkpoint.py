"""Reads a safetensors checkpoint as the tensors of a transformers model, a few names at a time."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from compression.errors import QuantizationError
from compression.prequantized import prequantized
from offload.conversion import Conversion
from offload.errors import CheckpointError
from offload.packed_tensor import PackedTensor, join_parts
from offload.safetensors_file import StoredTensor, file_fingerprint, find_files, read_header

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from compression.prequantized import Prequantized


class Checkpoint:
    """A checkpoint in `directory` that fits `model`, whose parameters may be on the meta device.

    Tensors come in `dtype`, except those that the model itself, or `dtypes`, which says so for a
    model that computes in another type, declares as float32 or integers.
    Raises `CheckpointError` unless all of the model's parameters and persistent buffers are there.
    """

    def __init__(
        self,
        directory: Path,
        model: PreTrainedModel,
        dtype: torch.dtype,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.directory = directory
        scheme = scheme_of(directory, model.config)
        self.unexpected: tuple[str, ...] = ()
        """Keys of the checkpoint that the model has no use for."""
        self._model = model
        self._declared: dict[str, torch.Tensor] = dict(model.state_dict())
        self._dtype = dtype
        self._dtypes = dtypes or {name: tensor.dtype for name, tensor in self._declared.items()}
        files = find_files(directory)
        self._files = {path: file_fingerprint(path) for path in files}
        stored = [tensor for path in files for tensor in read_header(path)]
        self._conversions = self._map_keys(join_parts(stored, scheme))
        for names in _tied_names(model):
            self._provide_tied(names)
        self._refuse_missing()
        self._refuse_other_shapes()
        formats = ((name, each.spec) for name, each in self._conversions.items())
        self.packed = {name: spec for name, spec in formats if spec is not None}
        """Tensors that come quantized: they are loaded as bytes, rows of this format."""

    def load(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors `names` of the model, on the CPU, one conversion's at a time.

        Tied names yield one tensor. The order is that of `names`, except that results of one
        conversion follow each other. Raises `CheckpointError`.
        """
        waiting = dict.fromkeys(names)
        for name in names:
            if name in waiting:
                yield from self._run(self._conversions[name], waiting)

    def in_place(self, names: Collection[str]) -> dict[str, StoredTensor] | None:
        """Where the bytes of `names` lie in the files; None unless all can be used as they are."""
        found = {}
        for name in names:
            conversion = self._conversions[name]
            stored = conversion.sources[0][1]
            if not isinstance(stored, StoredTensor) or conversion.converter is not None:
                return None
            if not stored.is_usable_as(self._dtype_of(name)):
                return None
            found[name] = stored
        return found

    def fingerprint(self) -> bytes:
        """Changes with the files, and with whatever else decides about the tensors' values."""
        parts = [self._files[path] for path in sorted(self._files)]
        if any(each.converter is not None for each in self._conversions.values()):
            # Conversions are transformers' and follow the settings of the model.
            config = self.directory / "config.json"
            settings = config.read_bytes() if config.is_file() else b""
            parts += [settings, transformers.__version__.encode()]
        return b"".join(parts)

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file is not the one whose header was read."""
        changed = [path for path, known in self._files.items() if file_fingerprint(path) != known]
        if changed:
            raise CheckpointError(
                f"{changed[0]} was changed while it was being read",
                hint="leave the checkpoint in place during a run, and run the command again",
            )

    def _run(
        self, conversion: Conversion, waiting: dict[str, None]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        made = conversion.run(self._model, self._dtype_of(conversion.target))
        for name in [name for name in conversion.provides if name in waiting]:
            del waiting[name]
            tensor = made[conversion.provides[name]]
            self._check_shape(name, tensor.shape, conversion)
            packed = name in self.packed
            yield name, tensor if packed else tensor.to(self._dtype_of(name)).contiguous()

    def _dtype_of(self, name: str) -> torch.dtype:
        declared = self._dtypes[name]
        kept = declared == torch.float32 or not declared.is_floating_point
        return declared if kept else self._dtype

    def _map_keys(self, stored: Iterable[StoredTensor | PackedTensor]) -> dict[str, Conversion]:
        rename = _KeyRenaming(self._model, self._declared)
        conversions: dict[str, Conversion] = {}
        unexpected = []
        # transformers' operations stack, say, the experts of a layer in this order.
        for tensor in sorted(stored, key=lambda tensor: dot_natural_key(tensor.key)):
            name, pattern = rename(tensor.key)
            if name not in self._declared:
                unexpected.append(tensor.key)
                continue
            if name not in conversions:
                converter = None if pattern is None else rename.converters[pattern]
                conversions[name] = Conversion(name, converter)
            conversions[name].sources.append((pattern or tensor.key, tensor))
        ignored = _ignored_keys(self._model)
        self.unexpected = tuple(key for key in unexpected if not ignored.search(key))
        for conversion in list(conversions.values()):
            for target in conversion.targets:
                if target in self._declared:
                    conversion.provides[target] = target
                    conversions[target] = conversion
        return conversions

    def _provide_tied(self, names: list[str]) -> None:
        present = [name for name in names if name in self._conversions]
        if not present:
            return
        first = self._conversions[present[0]]
        for name in present[1:]:
            if not first.has_same_bytes(self._conversions[name]):
                raise CheckpointError(
                    f"{self.directory}: config.json ties {present[0]} to {name}, but the "
                    "checkpoint has different values for the two",
                    hint='set "tie_word_embeddings": false in config.json',
                )
        for name in names:
            first.provides[name] = first.provides[present[0]]
            self._conversions[name] = first

    def _refuse_missing(self) -> None:
        missing = [name for name in self._declared if name not in self._conversions]
        if missing:
            raise CheckpointError(
                f"{self.directory} lacks {len(missing)} of the model's {len(self._declared)} "
                f"tensors: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}",
                hint="check that config.json belongs to this checkpoint, or download it again",
            )

    def _refuse_other_shapes(self) -> None:
        for name, conversion in self._conversions.items():
            stored = conversion.sources[0][1]
            if conversion.converter is None:
                shape = stored.shape
                if isinstance(stored, PackedTensor):
                    shape = stored.spec.packed_shape(shape)
                self._check_shape(name, shape, conversion)

    def _check_shape(self, name: str, shape: tuple[int, ...], conversion: Conversion) -> None:
        expected = tuple(self._declared[name].shape)
        stored = conversion.sources[0][1]
        if isinstance(stored, PackedTensor):
            expected = stored.rows_of(name, expected)
        if tuple(shape) != expected:
            raise CheckpointError(
                f"{name} must have the shape {expected} but has {tuple(shape)} "
                f"in the checkpoint ({stored.path}, {stored.key})",
                hint="check that config.json belongs to this checkpoint",
            )


class _KeyRenaming:
    """From a checkpoint's key to the model's name, the way `from_pretrained` goes."""

    def __init__(self, model: PreTrainedModel, declared: dict[str, torch.Tensor]) -> None:
        mapping = get_model_conversion_mapping(model)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.converters = {pattern: each for each in converters for pattern in each.source_patterns}
        self._transforms = ([e for e in mapping if isinstance(e, WeightRenaming)], converters)
        self._declared = declared
        self._prefix = model.base_model_prefix

    def __call__(self, key: str) -> tuple[str, str | None]:
        """The model's name and the pattern of the converter that makes it, if one does."""
        name, pattern = self._rename(key, *self._transforms)
        if name not in self._declared and key in self._declared:
            # The key is already as the model has it; a rule meant for older ones matched it.
            name, pattern = self._rename(key, [], [])
        return name, pattern

    def _rename(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, Any]:
        return rename_source_key(
            key,
            renamings,
            converters,
            base_model_prefix=self._prefix,
            meta_state_dict=self._declared,
        )


def _tied_names(model: PreTrainedModel) -> list[list[str]]:
    """Groups of names that stand for one parameter: one object, or tied by the configuration."""
    groups: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    for target, source in model.all_tied_weights_keys.items():
        from_group, into = groups[id(parameters[target])], groups[id(parameters[source])]
        if from_group is not into:
            into += from_group
            groups.update({id(parameters[name]): into for name in from_group})
    return [names for key, names in groups.items() if len(names) > 1]


def _ignored_keys(model: PreTrainedModel) -> re.Pattern[str]:
    """Keys that transformers, too, drops without a word."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return re.compile("|".join([*patterns, r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]))


def scheme_of(directory: Path, config: PretrainedConfig) -> Prequantized | None:
    """How the checkpoint's matrices are quantized, if they are. Raises `CheckpointError`."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    try:
        return prequantized(settings if isinstance(settings, dict) else settings.to_dict())
    except QuantizationError as error:
        raise CheckpointError(f"{directory} is quantized: {error.message}", error.hint) from None
