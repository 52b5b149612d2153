"""Facts about files that are read and written past the page cache."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from offload import direct_file
from offload.direct_file import DirectFile
from offload.errors import OffloadStoreError
from offload.ram import map_memory

SIZE = 5 * 4096 + 1234
BLOCK = DirectFile.block


def random_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def aligned_copy(data: torch.Tensor) -> torch.Tensor:
    return map_memory(len(data)).copy_(data)


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.fixture
def content() -> torch.Tensor:
    return random_bytes(SIZE)


@pytest.fixture
def path(tmp_path: Path, content: torch.Tensor) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(content.numpy().tobytes())
    return path


@pytest.fixture
def file(path: Path):
    file = DirectFile.open(path)
    yield file
    file.close()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without direct I/O."""
    real_open = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "ignored")
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(direct_file, "_warned", False)


def flags_used(monkeypatch: pytest.MonkeyPatch, name: str = "preadv") -> list[bool]:
    """Whether each call went through a descriptor with O_DIRECT."""
    import fcntl

    used: list[bool] = []
    call = getattr(os, name)

    def spy(descriptor, buffers, offset):
        used.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        return call(descriptor, buffers, offset)

    monkeypatch.setattr(os, name, spy)
    return used


def test_aligned_reads_go_past_the_page_cache(file, content, monkeypatch):
    """Whole blocks into aligned memory are one direct request; the last may reach past the end."""
    used = flags_used(monkeypatch)
    target = map_memory(6 * BLOCK).zero_()
    file.read(0, target)
    assert torch.equal(target[:SIZE], content)
    assert not target[SIZE:].any()
    assert used == [file.direct]
    assert file.size == SIZE


@pytest.mark.parametrize(
    ("start", "stop"), [(0, SIZE), (1, 2), (4095, 8193), (SIZE - 1, SIZE), (7, 7), (4096, 8191)]
)
def test_other_reads_are_served_too(file, content, monkeypatch, start, stop):
    """Any offset, length and address gives the bytes, by way of a buffered descriptor."""
    used = flags_used(monkeypatch)
    target = map_memory(stop - start + 1)[1:]
    file.read(start, target)
    assert torch.equal(target, content[start:stop])
    assert used == [False] * bool(len(target))


def test_what_lies_beyond_the_end_is_left_alone(file, content):
    """An unaligned request past the end fills what exists."""
    target = torch.full((100,), 7, dtype=torch.uint8)
    file.read(SIZE - 10, target)
    assert torch.equal(target[:10], content[-10:])
    assert target[10:].tolist() == [7] * 90


@pytest.mark.parametrize("step", [BLOCK, 1000])
def test_interrupted_requests_are_continued(file, content, tmp_path, monkeypatch, step):
    """The system may move fewer bytes than asked for, and unaligned counts: the rest follows."""
    for name in ("pwritev", "preadv"):
        call = getattr(os, name)

        def few(descriptor, buffers, offset, call=call):
            count = min(step, len(buffers[0]))
            if count % BLOCK:  # what a direct descriptor would refuse to be asked for
                copy = memoryview(bytearray(buffers[0]))
                moved = call(plain, [copy[:count]], offset)
                buffers[0][:moved] = copy[:moved]
                return moved
            return call(descriptor, [buffers[0][:count]], offset)

        monkeypatch.setattr(os, name, few)
    plain = os.open(file.path, os.O_RDONLY)
    target = map_memory(6 * BLOCK)
    file.read(0, target)
    assert torch.equal(target[:SIZE], content)
    os.close(plain)
    written = DirectFile.create(tmp_path / "new", 3 * BLOCK)
    plain = os.open(written.path, os.O_RDWR)
    written.write(0, aligned_copy(content[: 3 * BLOCK]))
    assert (tmp_path / "new").read_bytes() == content[: 3 * BLOCK].numpy().tobytes()
    os.close(plain)
    written.close()


def test_a_created_file_is_reserved_written_and_read(tmp_path, content, monkeypatch):
    """Its space is taken at once; writes of any alignment come back."""
    used = flags_used(monkeypatch, "pwritev")
    file = DirectFile.create(tmp_path / "new", SIZE)
    assert os.stat(tmp_path / "new").st_blocks * 512 >= SIZE
    assert file.size == SIZE
    file.write(0, aligned_copy(content[: 4 * BLOCK]))
    file.write(4 * BLOCK, content[4 * BLOCK :])
    file.sync()
    target = torch.zeros(SIZE, dtype=torch.uint8)
    file.read(0, target)
    assert torch.equal(target, content)
    assert used == [file.direct, False]
    file.check_unchanged()  # one's own writes are none of someone else
    file.close()


def test_a_nameless_file_has_no_name_when_it_takes_space(tmp_path, content, monkeypatch):
    """It is gone from its directory before anything is reserved, and works all the same."""
    reserve = os.posix_fallocate

    def checked(descriptor: int, offset: int, nbytes: int) -> None:
        assert not list(tmp_path.iterdir())
        reserve(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", checked)
    file = DirectFile.create(tmp_path / "new", SIZE, nameless=True)
    file.write(0, content)
    target = torch.zeros(SIZE, dtype=torch.uint8)
    file.read(0, target)
    assert torch.equal(target, content)
    file.close()
    assert not list(tmp_path.iterdir())


def test_threads_share_a_file(tmp_path):
    """Many threads read and write different places of one file at the same time."""
    content = random_bytes(64 * BLOCK)
    file = DirectFile.create(tmp_path / "new", len(content))

    def there_and_back(number: int) -> bool:
        start = number * BLOCK + number % 2  # every other one through the page cache
        piece = content[start : (number + 1) * BLOCK]
        file.write(start, aligned_copy(piece))
        target = map_memory(len(piece))
        file.read(start, target)
        return torch.equal(target, piece)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, range(64)))
    file.close()


def test_refused_direct_io_is_warned_of_once(refused, path, content, tmp_path, caplog):
    """Without O_DIRECT all files work through the page cache, with one warning per process."""
    before = descriptors()
    for name in ("one", "two"):
        file = DirectFile.open(path)
        created = DirectFile.create(tmp_path / name, SIZE)
        created.write(0, content)
        created.sync()
        for each in (file, created):
            assert not each.direct
            target = map_memory(6 * BLOCK)
            each.read(0, target)
            assert torch.equal(target[:SIZE], content)
            each.close()
    (record,) = caplog.records
    assert "O_DIRECT" in record.getMessage()
    assert descriptors() == before


def test_direct_io_refused_by_the_first_read(file, content, monkeypatch, caplog):
    """Where only the request is refused, not the open, the request is served all the same."""
    monkeypatch.setattr(direct_file, "_warned", False)
    direct, call = file._past_cache, os.preadv

    def refuse(descriptor, buffers, offset):
        if descriptor == direct:
            raise OSError(errno.EINVAL, "ignored")
        return call(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    for start in (0, BLOCK):
        target = map_memory(2 * BLOCK)
        file.read(start, target)
        assert torch.equal(target, content[start : start + 2 * BLOCK])
    assert not file.direct
    assert len(caplog.records) == 1


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("left", [0, 100, 2 * BLOCK, SIZE - 1])
def test_a_file_that_became_shorter_is_an_error(path, aligned, left):
    """Reading what was cut off is an error that names file and place; what is left can be read."""
    file = DirectFile.open(path)
    os.truncate(path, left)
    target = map_memory(6 * BLOCK + 1)[0 if aligned else 1 :][: 6 * BLOCK]
    with pytest.raises(OffloadStoreError, match=rf"file\.bin stopped at byte {left}: .* shorter"):
        file.read(0, target)
    with pytest.raises(OffloadStoreError, match="was changed while a job was reading it"):
        file.check_unchanged()
    file.close()


def test_a_file_replaced_by_its_name_is_still_the_one_opened(path, file):
    """Another file under the name is no change: all requests are served from the old one."""
    file.check_unchanged()
    replacement = path.with_name("other")
    replacement.write_bytes(b"x")
    replacement.replace(path)
    target = torch.empty(10, dtype=torch.uint8)
    file.read(0, target)  # the buffered descriptor, opened now, is of the old file, too
    file.check_unchanged()


def test_a_write_in_place_is_noticed(path, file):
    """A byte changed by another program is found by the file's time stamp."""
    time.sleep(0.02)  # time stamps have the resolution of the kernel's clock tick
    with path.open("r+b") as other:
        other.write(b"x")
    with pytest.raises(OffloadStoreError, match="was changed while") as caught:
        file.check_unchanged()
    assert "leave the file in place" in str(caught.value)


@pytest.mark.parametrize(("name", "verb"), [("preadv", "reading"), ("pwritev", "writing")])
@pytest.mark.parametrize(
    ("number", "hint"), [(errno.EIO, "check the disk"), (errno.ENOSPC, "--offload-dir")]
)
def test_errors_of_the_system_are_explained(tmp_path, monkeypatch, name, verb, number, hint):
    """A failed request names the file, the place, the reason and the next step."""
    file = DirectFile.create(tmp_path / "new", 2 * BLOCK)

    def fail(*_):
        raise OSError(number, "ignored")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OffloadStoreError) as caught:
        (file.read if name == "preadv" else file.write)(BLOCK, map_memory(BLOCK))
    assert f"{verb} {file.path} at byte {BLOCK} failed: {os.strerror(number)}" in str(caught.value)
    assert hint in str(caught.value)
    file.close()


def test_a_full_disk_is_found_when_the_file_is_made(tmp_path):
    """On a real full file system nothing is left: no file, no descriptor."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip("mounting is not permitted")
    try:
        before = descriptors()
        with pytest.raises(OffloadStoreError, match="reserving 2097152 bytes") as caught:
            DirectFile.create(mount / "new", 2**21)
        assert "--offload-dir" in str(caught.value)
        assert list(mount.iterdir()) == []
        assert descriptors() == before
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_files_that_cannot_be_opened_leak_nothing(tmp_path, path):
    """A missing file, a directory and a name that is taken are errors without open descriptors."""
    before = descriptors()
    with pytest.raises(OffloadStoreError, match=r"opening .*missing failed: No such file"):
        DirectFile.open(tmp_path / "missing")
    with pytest.raises(OffloadStoreError, match="is not a file"):
        DirectFile.open(tmp_path)
    with pytest.raises(OffloadStoreError, match=r"creating .* failed: File exists"):
        DirectFile.create(path, 10)
    assert path.stat().st_size == SIZE
    assert descriptors() == before


def test_closing_twice_is_harmless(path):
    """Both descriptors go with the first `close`; the second does nothing."""
    before = descriptors()
    file = DirectFile.open(path)
    file.read(1, torch.empty(10, dtype=torch.uint8))
    assert len(descriptors()) == len(before) + 1 + file.direct
    file.close()
    file.close()
    assert descriptors() == before


def test_the_lock_is_released_after_errors(file, monkeypatch):
    """A buffered descriptor that could not be opened is tried again by the next request."""
    opener, calls = os.open, threading.Event()

    def fail_once(*args):
        if not calls.is_set():
            calls.set()
            raise OSError(errno.EMFILE, "ignored")
        return opener(*args)

    monkeypatch.setattr(os, "open", fail_once)
    target = torch.empty(10, dtype=torch.uint8)
    if file.direct:
        with pytest.raises(OffloadStoreError, match="Too many open files"):
            file.read(1, target)
    file.read(1, target)
