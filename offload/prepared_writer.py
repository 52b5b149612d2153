"""Writes a prepared store, unit by unit, so that a writer that was killed can be continued.

After each unit what was written is brought to the disk, then its checksums are added to a file
beside it. Who continues takes the blocks whose checksums are there and still match, and goes on
with the first unit that is not whole: the files come out the same.
"""

from __future__ import annotations

import fcntl
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

from offload.direct_file import DirectFile
from offload.errors import CapacityError
from offload.prepared_file import as_bytes, block_checksums
from offload.prepared_layout import (
    PREPARED_BLOCK,
    UNFINISHED,
    WEIGHTS,
    SizedTensor,
    layout,
    prepared_bytes,
    unit_ends,
)
from offload.ram import map_memory
from offload.tiers import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from compression.spec import GroupFormat

logger = logging.getLogger(__name__)

CHECKSUMS, INDEX = "checksums.bin", "index.json"
PROGRESS = "progress.bin"
"""Checksums of the blocks that are on the disk, while there are more to come."""
FORMAT = 1
"""Raise it when layout, files or checksums change: stores of other formats are written again."""
WRITE_BYTES = 8 * 2**20
"""Of one request."""


class TypedTensor(SizedTensor, Protocol):
    """A stored tensor with all that decides about its bytes."""

    @property
    def shape(self) -> torch.Size:
        """Its shape in the model."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type it is stored in, or quantized from."""
        ...

    @property
    def spec(self) -> GroupFormat | None:
        """How it is quantized."""
        ...

    def stored(self, values: torch.Tensor) -> torch.Tensor:
        """Its bytes, uint8 [nbytes]."""
        ...


class TensorSource(Protocol):
    """Where weights are read from: a checkpoint, or a model in memory."""

    def load(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and values of each of `names`, in about this order."""
        ...


class PreparedFileWriter:
    """Writes the bytes of a file in order, through one buffer, and collects checksums."""

    def __init__(self, path: Path, nbytes: int) -> None:
        """Goes on with the file of this size that an earlier writer left at `path`, if any."""
        self._progress = path.with_name(PROGRESS)
        self._buffer = map_memory(min(WRITE_BYTES, nbytes))
        self._filled = 0
        self._written = 0
        self._checksums: list[int] = []
        self._kept = 0
        """Checksums that are in the file of them."""
        if path.exists() and path.stat().st_size == nbytes and self._progress.exists():
            self._file = DirectFile.reopen(path)
            self._take_over()
        else:
            path.unlink(missing_ok=True)
            self._progress.write_bytes(b"")
            self._file = DirectFile.create(path, nbytes)

    def _take_over(self) -> None:
        """Count what is there and as its checksums say."""
        data = self._progress.read_bytes()
        known = np.frombuffer(data[: len(data) // 8 * 8], dtype="<u8").tolist()
        step = len(self._buffer) // PREPARED_BLOCK
        for first in range(0, len(known), step):
            some = known[first : first + step]
            buffer = self._buffer[: len(some) * PREPARED_BLOCK]
            self._file.read(self._written, buffer)
            found = block_checksums(as_bytes(buffer))
            same = next((i for i, each in enumerate(found) if each != some[i]), len(some))
            self._checksums += found[:same]
            self._written += same * PREPARED_BLOCK
            if same < len(some):
                break

    def start_at(self, ends: Sequence[int]) -> int:
        """Go on at the last of `ends`, of units, that an earlier writer reached; 0 if none."""
        start = max((end for end in ends if end <= self._written), default=0)
        self._written = start
        del self._checksums[start // PREPARED_BLOCK :]
        self._kept = len(self._checksums)
        with self._progress.open("r+b") as file:
            file.truncate(8 * self._kept)
        return start

    def append(self, data: torch.Tensor) -> None:
        """Write the uint8 tensor `data` next."""
        done = 0
        while done < len(data):
            room = self._buffer[self._filled :][: len(data) - done]
            room.copy_(data[done : done + len(room)])
            self._filled += len(room)
            done += len(room)
            if self._filled == len(self._buffer):
                self._flush()

    def pad_to(self, offset: int) -> None:
        """Write zeros up to byte `offset`, less than a block away."""
        missing = offset - self._written - self._filled
        self.append(torch.zeros(missing, dtype=torch.uint8))

    def keep(self) -> None:
        """What was written, whole blocks, survives this process and a power cut."""
        self._flush()
        self._file.sync()
        with self._progress.open("ab") as file:
            file.write(np.array(self._checksums[self._kept :], dtype="<u8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._kept = len(self._checksums)

    def finish(self) -> bytes:
        """The checksums of all blocks, once everything is written and kept."""
        assert self._written == self._file.size
        return np.array(self._checksums, dtype="<u8").tobytes()

    def _flush(self) -> None:
        data = self._buffer[: self._filled]
        self._checksums += block_checksums(as_bytes(data))
        self._file.write(self._written, data)
        self._written += self._filled
        self._filled = 0

    def close(self) -> None:
        """Give the descriptors back."""
        self._file.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the system frees it even if this process is killed."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("waiting for another process that prepares weights in %s", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_leftovers(home: Path, key: str) -> None:
    """What killed writers of other stores left (we hold the lock), or an older format."""
    unfinished = _unfinished(home, key)
    for leftover in (*home.glob(f"*{UNFINISHED}*"), home / key):
        if leftover.exists() and leftover != unfinished:
            logger.warning("removing %s, which is not whole or has an older format", leftover)
            shutil.rmtree(leftover)


def _unfinished(home: Path, key: str) -> Path:
    return home / f"{key}{UNFINISHED}"


def write_store(
    home: Path,
    key: str,
    source: TensorSource,
    units: Sequence[Sequence[TypedTensor]],
    check: Callable[[], None],
) -> None:
    """Write the store `key`, or what is missing of it, and give it its name.

    After an error nothing is left. Interrupted or killed, the next writer goes on.
    """
    nbytes, unfinished = prepared_bytes(units), _unfinished(home, key)
    reserved = sum(file.stat().st_blocks * 512 for file in unfinished.glob(WEIGHTS))
    if (free := shutil.disk_usage(home).free + reserved) < nbytes:
        raise CapacityError(
            f"the prepared weights need {format_size(nbytes)} in {home}, but "
            f"{format_size(nbytes - free)} is missing ({format_size(free)} is free)",
            hint="free space there or choose another directory with --offload-dir",
        )
    try:
        unfinished.mkdir(exist_ok=True)
        _write_files(unfinished, source, units)
        check()
        (unfinished / PROGRESS).unlink()  # until now a writer that is killed can be continued
        unfinished.rename(home / key)
        _sync(home)
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_files(path: Path, source: TensorSource, units: Sequence[Sequence[TypedTensor]]) -> None:
    offsets, nbytes = layout(units)
    ends = unit_ends(units)
    with closing(PreparedFileWriter(path / WEIGHTS, nbytes)) as writer:
        if start := writer.start_at(ends):
            logger.warning("going on at byte %d of %d in %s", start, nbytes, path)
        for unit, end in zip(units, ends):
            if end <= start:
                continue
            for tensor, data in _in_order(source, unit):
                writer.pad_to(offsets[tensor.name])
                writer.append(data)
            writer.pad_to(end)
            writer.keep()
        checksums = writer.finish()
    contents = {
        "nbytes": nbytes,
        "checksums": xxhash.xxh3_64_hexdigest(checksums),
        "tensors": [[w.name, offsets[w.name], w.nbytes] for unit in units for w in unit],
    }
    index = {"format": FORMAT, "xxh3_64": digest_of(contents), "contents": contents}
    for name, text in ((CHECKSUMS, checksums), (INDEX, json.dumps(index).encode())):
        (path / name).write_bytes(text)
        _sync(path / name)
    _sync(path)


def digest_of(contents: dict[str, Any]) -> str:
    """The checksum of an index."""
    return xxhash.xxh3_64_hexdigest(json.dumps(contents, sort_keys=True).encode())


def _in_order(
    source: TensorSource, unit: Sequence[TypedTensor]
) -> Iterator[tuple[TypedTensor, torch.Tensor]]:
    """Each tensor with its bytes; results of a conversion that come early wait for their turn."""
    waiting = list(reversed(unit))
    early: dict[str, torch.Tensor] = {}
    for name, values in source.load([tensor.name for tensor in unit]):
        early[name] = values
        del values
        while waiting and waiting[-1].name in early:
            tensor = waiting.pop()
            data = tensor.stored(early.pop(tensor.name))
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
