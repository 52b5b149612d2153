"""What happens to the prepared store when disks, sources and processes fail."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import torch

from offload.errors import CapacityError, CheckpointError, OffloadStoreError
from offload.prepared import PreparedStore, find_prepared, prepare
from offload.prepared_layout import FOLDER, PREPARED_BLOCK, WEIGHTS, unfinished_bytes
from offload.prepared_writer import PROGRESS
from policy_search.machine import disk_budget
from tests.offload.prepared_parts import (
    KEY,
    Source,
    Tensor,
    assert_holds,
    flip,
    make_units,
    names_in,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def units() -> list[list[Tensor]]:
    return make_units()


class BrokenSource(Source):
    """Fails with `error` instead of giving the tensor `b`."""

    def __init__(self, units: list[list[Tensor]], error: BaseException) -> None:
        super().__init__(units)
        self.error = error

    def load(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, values in super().load(names):
            if name == "b":
                raise self.error
            yield name, values


@pytest.mark.parametrize("error", [CheckpointError("bad"), OSError(errno.EIO, "bad")])
def test_a_failure_leaves_nothing(tmp_path, units, error):
    """Whatever breaks the writing off, nothing is left but the lock file."""
    expected = OffloadStoreError if isinstance(error, OSError) else type(error)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(expected):
        prepare(tmp_path, KEY, BrokenSource(units, error), units)
    assert names_in(tmp_path) == ["lock"]
    assert len(os.listdir("/proc/self/fd")) == before
    prepare(tmp_path, KEY, Source(units), units).close()


def test_a_source_that_changed_meanwhile_is_not_stored(tmp_path, units):
    """The check at the end runs before the store gets its name."""

    def check() -> None:
        raise CheckpointError("changed")

    with pytest.raises(CheckpointError, match="changed"):
        prepare(tmp_path, KEY, Source(units), units, check)
    assert names_in(tmp_path) == ["lock"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, units, monkeypatch):
    """A write that finds the disk full, although space was reserved, is an error with the flag."""
    call, count = os.pwritev, 0

    def full(descriptor, buffers, offset):
        nonlocal count
        count += 1
        if count > 2:
            raise OSError(errno.ENOSPC, "ignored")
        return call(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", full)
    monkeypatch.setattr("offload.prepared_writer.WRITE_BYTES", PREPARED_BLOCK)
    with pytest.raises(OffloadStoreError, match="No space left") as caught:
        prepare(tmp_path, KEY, Source(units), units)
    assert "--offload-dir" in str(caught.value)
    assert names_in(tmp_path) == ["lock"]


def test_a_limit_on_file_sizes_is_explained(tmp_path, units):
    """A file larger than the process may write is refused by the kernel, and nothing is left."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PREPARED_BLOCK, limits[1]))
    try:
        with pytest.raises(OffloadStoreError, match=r"reserving .* File too large"):
            prepare(tmp_path, KEY, Source(units), units)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == ["lock"]


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip("mounting is not permitted")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_too_small_a_disk_is_refused_before_reading(tmp_path, units):
    """On a real full file system the error names the missing bytes; nothing was read or is left."""
    with small_disk(tmp_path / "small", "200k") as disk:
        source = Source(units)
        with pytest.raises(CapacityError, match="is missing") as caught:
            prepare(disk, KEY, source, units)
        assert "--offload-dir" in str(caught.value)
        assert source.loaded == 0
        assert names_in(disk) == ["lock"]


CHILD = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from offload.prepared import prepare
from tests.offload.prepared_parts import KEY, Source, assert_holds, make_units

class Slow(Source):
    def load(self, names):
        for name, values in super().load(names):
            if name == "a":
                print("in the middle", flush=True)
                time.sleep({pause})
            yield name, values

units = make_units()
source = Slow(units)
store = prepare(Path({directory!r}), KEY, source, units)
assert_holds(store, units)
print("loaded", source.loaded, store.path.stat().st_ino, flush=True)
"""


def start(directory: Path, pause: float) -> subprocess.Popen[str]:
    code = CHILD.format(root=str(ROOT), directory=str(directory), pause=pause)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_in_the_middle(directory: Path) -> None:
    """Kill -9 when the first of two units is on the disk, and the second is under way."""
    child = start(directory, 60)
    assert child.stdout is not None
    assert child.stdout.readline() == "in the middle\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert names_in(directory) == [f"{KEY}.tmp", "lock"]
    assert find_prepared(directory, KEY) is None


def files_of(store: PreparedStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.path.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, units) -> dict[str, bytes]:
    """The files of a store that was written in one go."""
    store = prepare(tmp_path_factory.mktemp("whole"), KEY, Source(units), units)
    store.close()
    return files_of(store)


def test_a_killed_writer_is_continued(tmp_path, units, whole, caplog):
    """After kill -9 the next writer reads only what is missing; the files come out the same."""
    kill_in_the_middle(tmp_path)
    source = Source(units)
    store = prepare(tmp_path, KEY, source, units)
    assert source.loaded == sum(len(unit) for unit in units[1:])
    assert "going on at byte" in caplog.text
    assert_holds(store, units)
    store.close()
    assert names_in(tmp_path) == [KEY, "lock"]
    assert files_of(store) == whole


@pytest.mark.parametrize("damage", ["weights", "progress", "cut", "longer", "gone", "size"])
def test_what_a_killed_writer_left_is_verified(tmp_path, units, whole, damage):
    """Blocks that are not as their checksums say are written again, and all that follow."""
    kill_in_the_middle(tmp_path)
    left = tmp_path / FOLDER / f"{KEY}.tmp"
    weights, progress = left / WEIGHTS, left / PROGRESS
    if damage == "weights":
        flip(weights, PREPARED_BLOCK + 5)
    elif damage == "progress":
        flip(progress, 9)
    elif damage == "cut":  # in the middle of a checksum
        progress.write_bytes(progress.read_bytes()[:-3])
    elif damage == "longer":
        progress.write_bytes(progress.read_bytes() + b"\x01" * 8)
    elif damage == "gone":
        progress.unlink()
    else:
        with weights.open("ab") as file:
            file.write(b"more")
    source = Source(units)
    store = prepare(tmp_path, KEY, source, units)
    everything = sum(len(unit) for unit in units)
    assert source.loaded == (everything - len(units[0]) if damage == "longer" else everything)
    store.close()
    assert files_of(store) == whole


def test_an_interrupted_writer_is_continued(tmp_path, units, whole):
    """Ctrl-C keeps what is done, however often."""
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, KEY, BrokenSource(units, KeyboardInterrupt()), units)
        assert names_in(tmp_path) == [f"{KEY}.tmp", "lock"]
    source = Source(units)
    store = prepare(tmp_path, KEY, source, units)
    assert source.loaded == sum(len(unit) for unit in units[1:])
    store.close()
    assert files_of(store) == whole


def test_a_whole_store_that_is_interrupted_is_not_written_again(tmp_path, units, whole):
    """After the last unit, before the store has its name."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, KEY, Source(units), units, interrupt)
    source = Source(units)
    store = prepare(tmp_path, KEY, source, units)
    assert source.loaded == 0
    store.close()
    assert files_of(store) == whole


def test_a_begun_store_counts_as_free(tmp_path):
    """Its place is reserved already: a job that continues it needs no other."""
    kill_in_the_middle(tmp_path)
    reserved = (tmp_path / FOLDER / f"{KEY}.tmp" / WEIGHTS).stat().st_blocks * 512
    assert unfinished_bytes(tmp_path) == reserved > 0
    free = shutil.disk_usage(tmp_path).free
    assert disk_budget(tmp_path) == pytest.approx(free + reserved, abs=16 * 2**20)
    prepare(tmp_path, "another", Source(make_units()), make_units()).close()
    assert unfinished_bytes(tmp_path) == 0


def test_what_another_store_left_is_removed(tmp_path, units):
    """Half of a store that nobody asks for takes no room for ever."""
    kill_in_the_middle(tmp_path)
    store = prepare(tmp_path, "another", Source(units), units)
    store.close()
    assert names_in(tmp_path) == ["another", "lock"]


def test_two_processes_prepare_the_same_store_at_once(tmp_path):
    """One writes, the other waits and says so; both read the same store."""
    children = [start(tmp_path, 1.5) for _ in range(2)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    lines = [out.splitlines()[-1].split() for out, _ in outputs]
    assert sorted(line[1] for line in lines) == ["0", "6"]
    assert len({line[2] for line in lines}) == 1
    assert names_in(tmp_path) == [KEY, "lock"]


def test_waiting_for_another_writer_is_said(tmp_path, units, caplog):
    """Who waits for the lock says so, and takes what the other one wrote."""
    child = start(tmp_path, 1.0)
    assert child.stdout is not None
    assert child.stdout.readline() == "in the middle\n"
    source = Source(units)
    store = prepare(tmp_path, KEY, source, units)
    assert source.loaded == 0
    assert "waiting for another process" in caplog.text
    assert_holds(store, units)
    store.close()
    child.communicate(timeout=60)
    assert child.returncode == 0
