"""What a checkpoint's safetensors headers say of its tensors (no torch)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offload.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

Shapes = dict[str, tuple[int, ...]]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DOWNLOAD_AGAIN = "download or copy the checkpoint again; this copy is incomplete"
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8",
    "I32": "int32",
    "U8": "uint8",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it is stored."""

    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    """Of its first byte in the file."""


def stored_tensors(directory: Path) -> dict[str, StoredTensor] | None:
    """All tensors that may hold weights; None without weight files. Raises `CheckpointError`.

    An index whose files were all left out counts as no weight files: plans need only config.json.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = _shards(index)
        missing = [file.name for file in files if not file.is_file()]
        if len(missing) == len(files):
            return None
        if missing:
            raise CheckpointError(
                f"{index} names {len(files)} files, but {len(missing)} of them are missing: "
                + ", ".join(missing[:3]),
                hint=_DOWNLOAD_AGAIN,
            )
    else:
        return None
    return {name: tensor for file in files for name, tensor in _header(file).items()}


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not a safetensors index ({error!r})", hint=_DOWNLOAD_AGAIN
        ) from error


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {
            name: StoredTensor(
                tuple(int(n) for n in entry["shape"]),
                _TYPES[entry["dtype"]],
                str(path),
                8 + length + int(entry["data_offsets"][0]),
            )
            for name, entry in header.items()
            if entry["dtype"] in _TYPES
        }
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}", hint="check the file's permissions"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error})", hint=_DOWNLOAD_AGAIN
        ) from error
    return entries
