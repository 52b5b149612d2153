"""Facts about the prepared store: its layout, its key, and that what it gives is verified."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from offload.errors import OffloadStoreError
from offload.placement import TensorSpec
from offload.prepared import PreparedStore, find_prepared, model_key, prepare
from offload.prepared_file import PreparedFile
from offload.prepared_layout import PREPARED_BLOCK, layout, prepared_bytes
from offload.ram import map_memory
from offload.tiers import CACHE_LINE
from tests.offload.prepared_parts import (
    KEY,
    Source,
    Tensor,
    as_bytes,
    assert_holds,
    flip,
    make_units,
    names_in,
    read,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def units() -> list[list[Tensor]]:
    return make_units()


@pytest.fixture
def store(tmp_path: Path, units: list[list[Tensor]]):
    store = prepare(tmp_path, KEY, Source(units), units)
    yield store
    store.close()


def test_the_layout_is_known_ahead(store, units):
    """Units start on blocks, tensors on cache lines in their order; the size is as computed."""
    offsets, nbytes = layout(units)
    assert nbytes == prepared_bytes(units) == store.nbytes
    assert (store.path / "weights.bin").stat().st_size == nbytes
    assert nbytes % PREPARED_BLOCK == 0
    assert [offsets[unit[0].name] % PREPARED_BLOCK for unit in units if unit] == [0, 0, 0]
    assert all(offset % CACHE_LINE == 0 for offset in offsets.values())
    flat = [tensor for unit in units for tensor in unit]
    for one, other in pairwise(flat):
        assert offsets[one.name] + one.nbytes <= offsets[other.name]
    for tensor in flat:
        extent = store.extent(tensor.name)
        assert (extent.offset, extent.nbytes) == (offsets[tensor.name], tensor.nbytes)
    specs = [[TensorSpec(w.name, 0, w.nbytes) for w in unit] for unit in units]
    assert prepared_bytes(specs) == nbytes


def test_the_layout_needs_no_torch():
    """Planning computes the size of the file without importing torch."""
    code = "import sys, offload.prepared_layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("write_bytes", [8 * 2**20, PREPARED_BLOCK, 3 * PREPARED_BLOCK])
def test_tensors_come_back(tmp_path, units, monkeypatch, reverse, write_bytes):
    """All bytes are there, whatever the request size and the order the source gives them in."""
    monkeypatch.setattr("offload.prepared_writer.WRITE_BYTES", write_bytes)
    store = prepare(tmp_path, KEY, Source(units, reverse), units)
    assert_holds(store, units)
    store.close()
    assert names_in(tmp_path) == [KEY, "lock"]


def test_a_store_is_written_once(tmp_path, units, store):
    """A second run reads nothing from the source; closing leaves no descriptor open."""
    before = len(os.listdir("/proc/self/fd"))
    source = Source(units)
    again = prepare(tmp_path, KEY, source, units)
    found = find_prepared(tmp_path, KEY)
    assert found is not None
    assert_holds(again, units)
    assert_holds(found, units)
    assert source.loaded == 0
    again.close()
    found.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert find_prepared(tmp_path, "another") is None
    assert find_prepared(tmp_path / "nowhere", KEY) is None


class Counting(Source):
    """Gives copies, and counts the bytes of those that somebody still holds."""

    def __init__(self, units: list[list[Tensor]]) -> None:
        super().__init__(units, reverse=True)
        self.held = self.most_held = 0

    def load(self, names):
        for name, values in super().load(names):
            copy = values.clone()
            self.held += copy.nbytes
            self.most_held = max(self.most_held, self.held)
            weakref.finalize(copy, self._forget, copy.nbytes)
            yield name, copy
            del copy

    def _forget(self, nbytes: int) -> None:
        self.held -= nbytes


def test_no_more_than_a_unit_is_held(tmp_path, units):
    """Even if the last tensor of a unit comes first; what is written is let go."""
    source = Counting(units)
    prepare(tmp_path, KEY, source, units).close()
    assert source.most_held <= max(sum(tensor.nbytes for tensor in unit) for unit in units)
    assert source.held == 0


def test_the_key_is_of_files_types_shapes_names_and_order(units):
    """Whatever changes the bytes or their order changes the key."""
    other_type = [[Tensor(w.name, w.values.half()) for w in unit] for unit in units]
    other_name = [[Tensor(w.name + "x", w.values) for w in unit] for unit in units]
    other_shape = [[Tensor(w.name, w.values.view(1, -1)) for w in unit] for unit in units]
    other_units = [[*units[0], *units[1]], *units[2:]]
    variants = [units, other_type, other_name, other_shape, other_units, units[::-1]]
    keys = [model_key(b"files", each) for each in variants] + [model_key(b"others", units)]
    assert len(set(keys)) == len(keys)
    assert model_key(b"files", make_units()) == keys[0]


def rows(store: PreparedStore, number: int, row_bytes: int) -> torch.Tensor:
    target = torch.zeros(row_bytes, dtype=torch.uint8)
    store.file.read(store.extent("table").offset + number * row_bytes, target)
    return target


def test_single_rows_are_read_from_verified_blocks(store, units):
    """Unaligned reads of any size give the bytes, within a block, across, and over many."""
    whole, row = as_bytes(units[0][0]), 33 * 4
    for number in (0, 500, 124, 999, 500):
        assert torch.equal(rows(store, number, row), whole[number * row :][:row])
    for start, stop in ((5, 100_000), (PREPARED_BLOCK, 50_000), (16_000, 2 * PREPARED_BLOCK)):
        target = torch.zeros(stop - start, dtype=torch.uint8)
        store.file.read(start, target)
        assert torch.equal(target, whole[start:stop])


@pytest.mark.parametrize("aligned", [True, False])
def test_a_flipped_bit_is_found_where_it_is(tmp_path, units, store, aligned):
    """The first read of the damaged block is an error, and only of that block."""
    store.close()
    flip(store.path / "weights.bin", PREPARED_BLOCK + 77)
    opened = find_prepared(tmp_path, KEY)
    assert opened is not None
    target = map_memory(PREPARED_BLOCK) if aligned else torch.empty(10, dtype=torch.uint8)
    for _ in range(2):
        for block in (0, 2, 3):
            opened.file.read(block * PREPARED_BLOCK, target)
        with pytest.raises(OffloadStoreError, match=r"weights\.bin is damaged: .* at byte 16384"):
            opened.file.read(PREPARED_BLOCK, target)
    with pytest.raises(OffloadStoreError, match="1 of 9 blocks") as caught:
        read(opened, "table")
    assert f"delete {opened.path}" in str(caught.value)
    opened.close()
    shutil.rmtree(opened.path)
    again = prepare(tmp_path, KEY, Source(units), units)
    assert_holds(again, units)
    again.close()


def test_a_block_is_verified_once(store, monkeypatch):
    """The second read of a block costs no checksum."""
    hashed: list[int] = []
    original = PreparedFile._verify

    def spy(self, start, data):
        hashed.append(data.nbytes)
        original(self, start, data)

    monkeypatch.setattr(PreparedFile, "_verify", spy)
    read(store, "a")
    first = sum(hashed)
    assert first >= store.extent("a").nbytes
    read(store, "a")
    store.file.read(store.extent("a").offset + 3, torch.empty(5, dtype=torch.uint8))
    assert sum(hashed) == first


def test_a_store_changed_under_its_reader_is_noticed(store):
    """Truncated while open: reads of the missing part fail, and so does the check."""
    store.check_unchanged()
    os.truncate(store.path / "weights.bin", PREPARED_BLOCK)
    with pytest.raises(OffloadStoreError, match="shorter"):
        read(store, "norm")
    with pytest.raises(OffloadStoreError, match="was changed"):
        store.check_unchanged()


def damage_index(path: Path) -> None:
    index = json.loads((path / "index.json").read_text())
    index["contents"]["tensors"][0][1] += 64
    (path / "index.json").write_text(json.dumps(index))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights cut": lambda path: os.truncate(path / "weights.bin", PREPARED_BLOCK),
    "weights gone": lambda path: (path / "weights.bin").unlink(),
    "index cut": lambda path: os.truncate(path / "index.json", 50),
    "index empty": lambda path: (path / "index.json").write_text("[]"),
    "index gone": lambda path: (path / "index.json").unlink(),
    "index changed": damage_index,
    "checksums changed": lambda path: flip(path / "checksums.bin", 9),
    "checksums gone": lambda path: (path / "checksums.bin").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_not_trusted(tmp_path, units, store, damage):
    """Any damage to the store's files is an error that says what to delete."""
    store.close()
    DAMAGES[damage](store.path)
    before = len(os.listdir("/proc/self/fd"))
    for opened in (find_prepared, lambda d, k: prepare(d, k, Source(units), units)):
        with pytest.raises(OffloadStoreError, match="cannot be used") as caught:
            opened(tmp_path, KEY)
        assert f"delete {store.path}" in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_store_of_another_format_is_written_again(tmp_path, units, store):
    """A store of an older version counts as not there, and is replaced."""
    index = json.loads((store.path / "index.json").read_text())
    (store.path / "index.json").write_text(json.dumps(index | {"format": 0}))
    assert find_prepared(tmp_path, KEY) is None
    again = prepare(tmp_path, KEY, Source(units), units)
    assert_holds(again, units)
    again.close()
    assert names_in(tmp_path) == [KEY, "lock"]
