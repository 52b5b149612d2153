"""The prepared store: all weights of a model in a layer-ordered, checksummed file on disk.

It is written once and reused by later runs, by several at the same time, too. A store appears under
its final name only when it is whole and on the disk; until then it is a directory `*.tmp`, which
nobody reads and which the next writer goes on with, or removes if it writes another store.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from compression.groupwise import METHOD
from offload.direct_file import file_error
from offload.errors import OffloadStoreError
from offload.links import FileExtent
from offload.prepared_file import PreparedFile
from offload.prepared_layout import FOLDER, PREPARED_BLOCK, WEIGHTS
from offload.prepared_writer import (
    CHECKSUMS,
    FORMAT,
    INDEX,
    digest_of,
    locked,
    remove_leftovers,
    write_store,
)
from offload.ram import map_memory
from offload.tiers import padded

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from offload.prepared_writer import TensorSource, TypedTensor


def model_key(fingerprint: bytes, units: Sequence[Sequence[TypedTensor]]) -> str:
    """The name of the store of these tensors, made from a checkpoint with this fingerprint."""
    digest = hashlib.sha256(f"{FORMAT} {PREPARED_BLOCK} ".encode() + fingerprint)
    tensors = [[[w.name, str(w.dtype), list(w.shape)] for w in unit] for unit in units]
    digest.update(json.dumps(tensors).encode())
    specs = [[[w.name, str(w.spec)] for w in unit if w.spec is not None] for unit in units]
    if any(specs):
        digest.update(json.dumps([METHOD, specs]).encode())
    return digest.hexdigest()[:32]


class PreparedStore:
    """A whole store in `path`, open to be read."""

    def __init__(self, path: Path, file: PreparedFile, tensors: dict[str, tuple[int, int]]) -> None:
        self.path = path
        self.file = file
        self.nbytes = file.size
        """Of `weights.bin`."""
        self._tensors = tensors

    def extent(self, name: str) -> FileExtent:
        """The exact bytes of tensor `name`."""
        return FileExtent(self.file, *self._tensors[name])

    def load(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and bytes (uint8) of each of `names`, which no other memory holds."""
        for name in names:
            offset, nbytes = self._tensors[name]
            start = offset // PREPARED_BLOCK * PREPARED_BLOCK  # so that reads go past the cache
            blocks = map_memory(padded(offset + nbytes, PREPARED_BLOCK) - start)
            self.file.read(start, blocks)
            yield name, blocks[offset - start :][:nbytes]

    def check_unchanged(self) -> None:
        """Raise `OffloadStoreError` if someone changed the file since it was opened."""
        self.file.check_unchanged()

    def close(self) -> None:
        """Give the descriptors back; the store stays on the disk."""
        self.file.close()


def store_path(directory: Path, key: str) -> Path:
    """Where in the offload directory the store `key` lies, or would."""
    return directory / FOLDER / key


def find_prepared(directory: Path, key: str) -> PreparedStore | None:
    """The store `key` in the offload directory `directory`; None if it has still to be prepared.

    Raises `OffloadStoreError` for one that is damaged.
    """
    path = store_path(directory, key)
    try:
        if not path.exists():
            return None
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            return None
        contents = index["contents"]
        if digest_of(contents) != index["xxh3_64"]:
            raise ValueError("its checksum is wrong")
        checksums = (path / CHECKSUMS).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{INDEX} cannot be read ({error!r})") from error
    if xxhash.xxh3_64_hexdigest(checksums) != contents["checksums"]:
        raise _damaged(path, f"{CHECKSUMS} has been changed")
    try:
        file = PreparedFile(path / WEIGHTS, np.frombuffer(checksums, dtype="<u8"))
    except OffloadStoreError as error:
        raise _damaged(path, error.message) from error
    if file.size != contents["nbytes"]:
        file.close()
        raise _damaged(path, f"{WEIGHTS} has {file.size} bytes instead of {contents['nbytes']}")
    return PreparedStore(path, file, {n: (at, size) for n, at, size in contents["tensors"]})


def _damaged(path: Path, reason: str) -> OffloadStoreError:
    return OffloadStoreError(
        f"the prepared weights in {path} cannot be used: {reason}",
        hint=f"delete {path}: the next run writes it again",
    )


def prepare(
    directory: Path,
    key: str,
    source: TensorSource,
    units: Sequence[Sequence[TypedTensor]],
    check: Callable[[], None] = lambda: None,
) -> PreparedStore:
    """Open the store `key` in `directory`; write it first if no process has done so yet.

    `check` is called at the end of writing and raises if the source changed in the meantime.
    Raises `OffloadStoreError`, `CapacityError`, and what `source` raises; nothing is left then.
    """
    store = find_prepared(directory, key)
    if store is not None:
        return store
    home = directory / FOLDER
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / "lock"):
            store = find_prepared(directory, key)  # perhaps written while we waited
            if store is None:
                remove_leftovers(home, key)
                write_store(home, key, source, units, check)
                store = find_prepared(directory, key)
    except OSError as error:
        raise file_error(error, f"preparing weights in {home}") from error
    assert store is not None
    return store
