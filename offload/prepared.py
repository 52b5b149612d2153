"""The prepared store: all weights of a model in a layer-ordered, checksummed file on disk.

It is written once and reused by later runs, by several at the same time, too. A store appears under
its final name only when it is whole and on the disk; until then it is a directory `*.tmp-*`, which
nobody reads and which the next writer removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import xxhash

from offload.direct_file import file_error
from offload.errors import CapacityError, OffloadStoreError
from offload.links import FileExtent
from offload.prepared_file import PreparedFile, PreparedFileWriter
from offload.prepared_layout import PREPARED_BLOCK, SizedTensor, layout, prepared_bytes
from offload.tiers import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

__all__ = ["PreparedStore", "find_prepared", "model_key", "prepare", "prepared_bytes"]

logger = logging.getLogger(__name__)

FOLDER = "flexrun-prepared"
WEIGHTS, CHECKSUMS, INDEX = "weights.bin", "checksums.bin", "index.json"
FORMAT = 1
"""Raise it when layout, files or checksums change: stores of other formats are written again."""


class TypedTensor(SizedTensor, Protocol):
    """A stored tensor with all that decides about its bytes."""

    @property
    def shape(self) -> torch.Size:
        """Its shape in the model."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type it is stored in."""
        ...


class TensorSource(Protocol):
    """Where weights are read from: a checkpoint, or a model in memory."""

    def load(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and values of each of `names`, in about this order."""
        ...


def model_key(fingerprint: bytes, units: Sequence[Sequence[TypedTensor]]) -> str:
    """The name of the store of these tensors, made from a checkpoint with this fingerprint."""
    digest = hashlib.sha256(f"{FORMAT} {PREPARED_BLOCK} ".encode() + fingerprint)
    tensors = [[[w.name, str(w.dtype), list(w.shape)] for w in unit] for unit in units]
    digest.update(json.dumps(tensors).encode())
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
        if _digest(contents) != index["xxh3_64"]:
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


def _digest(contents: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(contents, sort_keys=True).encode())


def _damaged(path: Path, reason: str) -> OffloadStoreError:
    return OffloadStoreError(
        f"the prepared weights in {path} cannot be used: {reason}",
        hint=f"delete {path}: the next run writes it again",
    )


def prepare(
    directory: Path,
    key: str,
    source: TensorSource,
    units: Sequence[Sequence[SizedTensor]],
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
        with _locked(home / "lock"):
            store = find_prepared(directory, key)  # perhaps written while we waited
            if store is None:
                _remove_leftovers(home, key)
                _write(home, key, source, units, check)
                store = find_prepared(directory, key)
    except OSError as error:
        raise file_error(error, f"preparing weights in {home}") from error
    assert store is not None
    return store


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the system frees it even if this process is killed."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("waiting for another process that prepares weights in %s", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(home: Path, key: str) -> None:
    """What killed writers left (we hold the lock: none is at work), or an older format."""
    for leftover in (*home.glob("*.tmp-*"), home / key):
        if leftover.exists():
            logger.warning("removing %s, which is not whole or has an older format", leftover)
            shutil.rmtree(leftover)


def _write(
    home: Path,
    key: str,
    source: TensorSource,
    units: Sequence[Sequence[SizedTensor]],
    check: Callable[[], None],
) -> None:
    nbytes = prepared_bytes(units)
    if (free := shutil.disk_usage(home).free) < nbytes:
        raise CapacityError(
            f"the prepared weights need {format_size(nbytes)} in {home}, but "
            f"{format_size(nbytes - free)} is missing ({format_size(free)} is free)",
            hint="free space there or choose another directory with --offload-dir",
        )
    unfinished = home / f"{key}.tmp-{os.getpid()}"
    try:
        unfinished.mkdir()
        _write_files(unfinished, source, units)
        check()
        unfinished.rename(home / key)
        _sync(home)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_files(path: Path, source: TensorSource, units: Sequence[Sequence[SizedTensor]]) -> None:
    offsets, nbytes = layout(units)
    with closing(PreparedFileWriter(path / WEIGHTS, nbytes)) as writer:
        for unit in units:
            for tensor, data in _in_order(source, unit):
                writer.pad_to(offsets[tensor.name])
                writer.append(data)
        writer.pad_to(nbytes)
        checksums = writer.finish().astype("<u8").tobytes()
    contents = {
        "nbytes": nbytes,
        "checksums": xxhash.xxh3_64_hexdigest(checksums),
        "tensors": [[w.name, offsets[w.name], w.nbytes] for unit in units for w in unit],
    }
    index = {"format": FORMAT, "xxh3_64": _digest(contents), "contents": contents}
    for name, text in ((CHECKSUMS, checksums), (INDEX, json.dumps(index).encode())):
        (path / name).write_bytes(text)
        _sync(path / name)
    _sync(path)


def _in_order(
    source: TensorSource, unit: Sequence[SizedTensor]
) -> Iterator[tuple[SizedTensor, torch.Tensor]]:
    """Each tensor with its bytes; results of a conversion that come early wait for their turn."""
    waiting = list(reversed(unit))
    early: dict[str, torch.Tensor] = {}
    for name, values in source.load([tensor.name for tensor in unit]):
        early[name] = values
        while waiting and waiting[-1].name in early:
            tensor = waiting.pop()
            data = early.pop(tensor.name).contiguous().view(-1).view(torch.uint8)
            assert data.nbytes == tensor.nbytes, f"{tensor.name} has {data.nbytes} bytes"
            yield tensor, data
    assert not waiting, f"the source did not give {waiting[-1].name}"


def _sync(path: Path) -> None:
    """Bring a file or a directory's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
