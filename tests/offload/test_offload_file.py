"""Facts about the file that is the DISK tier."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from offload.errors import OffloadStoreError
from offload.offload_file import OffloadFile
from offload.tiers import DISK_BLOCK as ALIGNMENT
from offload.tiers import padded


def random_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


@pytest.fixture
def file(tmp_path):
    file = OffloadFile(tmp_path, 64 * 1024)
    yield file
    file.close()


def test_bytes_come_back(file):
    """What was written at an offset is read from there, whatever the sizes."""
    whole = random_bytes(50_000)
    file.write(13, whole)
    for start, stop in ((0, 50_000), (1, 2), (4095, 8193), (49_999, 50_000), (7, 7)):
        target = torch.zeros(stop - start, dtype=torch.uint8)
        file.read(13 + start, target)
        assert torch.equal(target, whole[start:stop])


def test_extents_are_aligned_and_apart(file):
    """Extents begin on disk blocks and do not overlap."""
    extents = [file.extent(nbytes) for nbytes in (1, ALIGNMENT, ALIGNMENT + 1, 10)]
    assert [extent.offset for extent in extents] == [0, 4096, 8192, 16384]
    assert [padded(nbytes, ALIGNMENT) for nbytes in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    contents = [random_bytes(extent.nbytes) for extent in extents]
    for extent, content in zip(extents, contents):
        file.write(extent.offset, content)
    for extent, content in zip(extents, contents):
        target = torch.zeros(extent.nbytes, dtype=torch.uint8)
        extent.read_into(target)
        assert torch.equal(target, content)


def test_the_file_has_no_name_and_its_space_is_taken(tmp_path):
    """Nothing shows in the directory, so a kill leaves nothing there; the space is reserved."""
    file = OffloadFile(tmp_path / "new" / "directory", 100_000)
    status = os.fstat(file._file.fileno())
    assert list((tmp_path / "new" / "directory").iterdir()) == []
    assert status.st_nlink == 0
    assert status.st_blocks * 512 >= 100_000
    file.close()


def test_interrupted_reads_and_writes_are_continued(file, monkeypatch):
    """The system may move fewer bytes than asked for: the rest follows."""
    for name in ("pwritev", "preadv"):
        call = getattr(os, name)

        def few(descriptor, buffers, offset, call=call):
            return call(descriptor, [buffers[0][:1000]], offset)

        monkeypatch.setattr(os, name, few)
    content, target = random_bytes(4321), torch.zeros(4321, dtype=torch.uint8)
    file.write(5, content)
    file.read(5, target)
    assert torch.equal(target, content)


def test_a_short_read_is_an_error(file):
    """A file that ends too early is reported with how far it went, not read as zeros."""
    os.ftruncate(file._file.fileno(), 1000)
    with pytest.raises(OffloadStoreError, match="stopped after 600 of 2000 bytes") as caught:
        file.read(400, torch.zeros(2000, dtype=torch.uint8))
    assert "--offload-dir" in str(caught.value)


def test_a_failing_read_is_an_error(file, monkeypatch):
    """An I/O error of the disk becomes an error that names the operation and the reason."""

    def fail(*_):
        raise OSError(errno.EIO, "ignored")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OffloadStoreError, match=r"reading .* failed: Input/output"):
        file.read(0, torch.zeros(10, dtype=torch.uint8))


def test_a_full_disk_while_writing_is_an_error(tmp_path):
    """No space left during a write is reported with the flag that helps."""
    file = OffloadFile(tmp_path, 10)
    file._file.close()
    with open("/dev/full", "r+b", buffering=0) as full:
        file._file = full  # type: ignore[assignment]
        with pytest.raises(OffloadStoreError, match=r"writing .* failed: No space left") as caught:
            file.write(0, torch.zeros(10, dtype=torch.uint8))
    assert "free space" in str(caught.value)
    assert "--offload-dir" in str(caught.value)


def test_a_full_disk_is_found_at_once(tmp_path, monkeypatch):
    """Space is reserved when the file is made; if there is none, no descriptor stays open."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, "ignored")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OffloadStoreError, match=r"reserving 4096 bytes in .*: No space left"):
        OffloadFile(tmp_path, 4096)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("below", ["file", "file/directory"])
def test_a_directory_that_cannot_be_used_is_an_error(tmp_path, below):
    """An offload directory that is a file, or lies below one, is refused."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadStoreError, match="creating an offload file in"):
        OffloadFile(tmp_path / below, 10)


def test_a_directory_that_takes_no_files_is_an_error():
    """A directory that exists but takes no files is refused."""
    with pytest.raises(OffloadStoreError, match="creating an offload file in /proc"):
        OffloadFile(Path("/proc"), 10)
