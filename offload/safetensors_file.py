"""Finds a checkpoint's safetensors files and reads single tensors out of them with plain reads."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from offload.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DOWNLOAD_AGAIN = "download or copy the checkpoint again; this copy is incomplete"
_MAX_HEADER = 100_000_000
"""Bytes, of a safetensors file by its specification."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes lie."""

    key: str
    """Its name in the checkpoint."""
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def is_usable_as(self, dtype: torch.dtype) -> bool:
        """The file's bytes are those of a tensor of `dtype`, and lie where one may begin."""
        return self.dtype == dtype and self.offset % dtype.itemsize == 0

    def read(self, start: int = 0, length: int | None = None) -> torch.Tensor:
        """The tensor, or its `length` bytes from byte `start` on as uint8."""
        nbytes = self.nbytes if length is None else min(length, self.nbytes - start)
        data = torch.empty(nbytes, dtype=torch.uint8)
        _read_into(data, self.path, self.offset + start)
        return data if length is not None else data.view(self.dtype).view(self.shape)


def _read_into(data: torch.Tensor, path: Path, offset: int) -> None:
    # Not mmap: mapped pages count as this process's memory and are read in 4 KiB faults.
    view = data.numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(
                        f"{path} is truncated: {len(view)} bytes are missing at its end",
                        hint=DOWNLOAD_AGAIN,
                    )
                view = view[count:]
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}",
            hint="check the disk, and leave the checkpoint in place during a run",
        ) from error


def read_header(path: Path) -> list[StoredTensor]:
    """Every tensor of the file `path`, after checking that the file is whole."""
    try:
        # The library checks that the header is sound and describes exactly the bytes after it.
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(header_size))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error})", hint=DOWNLOAD_AGAIN
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot open {path}: {error.strerror or error}",
            hint="check that the file exists and that you may read it",
        ) from error
    header.pop("__metadata__", None)
    return [_stored(key, path, entry, 8 + header_size) for key, entry in header.items()]


def file_fingerprint(path: Path) -> bytes:
    """Changes with the file: its name, size, time stamp and header, without reading the tensors."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            size = file.read(8)
            header = file.read(min(int.from_bytes(size, "little"), _MAX_HEADER))
    except OSError as error:
        raise CheckpointError(
            f"cannot open {path}: {error.strerror or error}",
            hint="check that the file exists and that you may read it",
        ) from error
    told = f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode()
    return hashlib.sha256(told + size + header).digest()


def _stored(key: str, path: Path, entry: dict[str, Any], data_start: int) -> StoredTensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {key} has the type {entry['dtype']}, which is not supported",
            hint="use a checkpoint stored as bfloat16, float16 or float32",
        )
    offset = data_start + entry["data_offsets"][0]
    return StoredTensor(key, path, dtype, tuple(entry["shape"]), offset)


def find_files(directory: Path) -> list[Path]:
    """The safetensors files of the checkpoint in `directory`. Raises `CheckpointError`."""
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if (directory / INDEX_FILE).is_file():
        return _shards(directory / INDEX_FILE)
    others = sorted(
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors")
        for path in directory.glob(pattern)
    )
    raise CheckpointError(
        f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}"
        + (f" (only {', '.join(others[:3])})" if others else ""),
        hint="point to a checkpoint in safetensors format; one in another format is converted by "
        "transformers: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)",
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not a safetensors index ({error!r})", hint=DOWNLOAD_AGAIN
        ) from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(names)} files, but {len(missing)} of them are missing: "
            + ", ".join(missing[:3])
            + (", ..." if len(missing) > 3 else ""),
            hint=DOWNLOAD_AGAIN,
        )
    return [index.parent / name for name in names]
