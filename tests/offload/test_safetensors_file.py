"""Single tensors come out of safetensors files whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offload.errors import CheckpointError
from offload.safetensors_file import INDEX_FILE, SINGLE_FILE, find_files, read_header


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24).reshape(2, 3, 4),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.float64),
    ],
)
def test_tensor_is_read_as_it_was_stored(tensor: torch.Tensor, tmp_path: Path):
    """Any shape and type, without elements and without dimensions too, comes back the same."""
    path = tmp_path / SINGLE_FILE
    save_file({"before": torch.ones(3, dtype=torch.uint8), "it": tensor}, path)
    (stored,) = [each for each in read_header(path) if each.key == "it"]
    read = stored.read()
    assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(read, tensor)
    assert stored.nbytes == tensor.nbytes
    assert torch.equal(stored.read(0, 2), read.reshape(-1).view(torch.uint8)[:2])


def test_short_reads_are_continued(tmp_path: Path, monkeypatch):
    """A read that returns less than asked for is continued where it ended."""
    expected = torch.arange(100)
    save_file({"it": expected}, tmp_path / SINGLE_FILE)
    (stored,) = read_header(tmp_path / SINGLE_FILE)
    original = Path.open

    class Slow:
        """A file that gives seven bytes at a time."""

        def __init__(self, file):
            self.file = file
            self.seek = file.seek

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def readinto(self, view):
            return self.file.readinto(view[:7])

    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Slow(original(self, *a, **k)))
    assert torch.equal(stored.read(), expected)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index_is_refused(index: str, tmp_path: Path):
    """An index file that cannot be read is refused."""
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        find_files(tmp_path)


def test_unknown_element_type_is_refused(tmp_path: Path):
    """A tensor of a type that torch and safetensors do not share is refused by name."""
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / SINGLE_FILE
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x00")
    with pytest.raises(CheckpointError, match="tensor w has the type F8_E8M0"):
        read_header(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 4, b"\xff" * 64, b"\x08" + b"\x00" * 7 + b"not json"]
)
def test_corrupt_header_is_refused(content: bytes, tmp_path: Path):
    """A file whose header makes no sense is refused."""
    path = tmp_path / SINGLE_FILE
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file") as caught:
        read_header(path)
    assert "download or copy" in str(caught.value)
