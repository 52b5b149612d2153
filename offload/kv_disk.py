"""KV pages on disk: full pages in a file, each sequence's last one, while it fills, in RAM."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import torch

from offload.direct_file import DirectFile, file_error
from offload.kv_staging import StagedPages
from offload.links import FileExtent, Link, SomeRows, TensorRows
from offload.paged_kv import PagedKV, page_elements
from offload.pages import kv_file_layout
from offload.tiers import DISK_BLOCK, Tier
from offload.transfer import URGENT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from offload.kv_layout import DiskPages, KVGroup, Run
    from offload.transfer import Transfer


class DiskKV(StagedPages):
    """One file for all layers, read ahead and appended in whole pages.

    The file has no name, so that nothing is left of it however the process ends. A sequence's pages
    are neighbours as far as the pool allows it, and are read as one. Nothing in the file has to be
    erased: a page is only read after all of it was written by its owner.
    """

    tier = Tier.DISK

    def __init__(self, directory: Path, pages: int, tails: int, *arguments: Any) -> None:
        """`pages` on disk, and the unfinished pages of up to `tails` sequences."""
        super().__init__(*arguments)
        self._itemsize: int = self.stagings[0].device.element_size()
        sizes = [page_elements(shape, self._page_tokens) for shape in self._shapes]
        self._page_bytes = [elements * self._itemsize for elements in sizes]
        unified = self._backend.unified
        ram = Tier.DEVICE if unified else Tier.HOST
        self._tails = [
            PagedKV.of(
                self._allocate(ram, tails * elements, "KV pages that are not full"),
                shape,
                self._page_tokens,
            )
            for elements, shape in zip(sizes, self._shapes)
        ]
        what = "staging for KV pages"
        self._pinned_in, self._pinned_out = (
            []
            if unified
            else [self._allocate(Tier.HOST, self._elements, what) for _ in self.stagings]
            for _ in range(2)
        )
        self._kept: list[list[Transfer]] = [[] for _ in self.stagings]
        """What still reads or fills each `pinned_out`."""
        self._starts, self.nbytes = kv_file_layout(self._page_bytes, pages)
        self._backend.account.charge(Tier.DISK, self.nbytes, "the KV cache")
        try:
            self._file: DirectFile | None = _nameless_file(directory, self.nbytes)
        except BaseException:
            self._backend.account.refund(Tier.DISK, self.nbytes)
            raise
        if any(size % DISK_BLOCK for size in self._page_bytes):
            # Pages share blocks: direct requests beside others through the cache could miss each
            # other's bytes.
            self._file.direct = False

    def fetch(
        self, layer: int, turn: int, group: KVGroup, after: Sequence[Transfer]
    ) -> list[Transfer]:
        """Full pages over the disk's link, the others from RAM."""
        pages, transfers = _pages_of(group), []
        free = self._before_fetch(turn, after)
        if pages.read:
            staging = self.stagings[turn].device.view(torch.uint8)
            copies = [
                (self._extent(layer, run), self._bytes(staging, layer, run.place, run.count))
                for run in pages.read
            ]
            transfers.append(
                self._transfers.submit_from_disk(copies, kind="kv", after=free, priority=URGENT)
            )
        if len(pages.tails) and not self._backend.unified:
            rows = TensorRows(self._tails[layer].raw, pages.tails, self._pinned_in[turn])
            transfers.append(
                self._transfers.submit(
                    Link.HOST_TO_DEVICE,
                    rows,
                    self.pool(layer, turn).raw[pages.num_full : group.num_filled],
                    kind="kv",
                    after=free,
                    priority=URGENT,
                )
            )
        return transfers

    def arrive(self, layer: int, turn: int, group: KVGroup) -> None:
        """Where RAM is the device's memory, pages that are not full come now."""
        super().arrive(layer, turn, group)
        pages = _pages_of(group)
        if len(pages.tails) and self._backend.unified:
            target = self.pool(layer, turn).raw[pages.num_full : group.num_filled]
            torch.index_select(self._tails[layer].raw, 0, pages.tails, out=target)

    def keep(
        self,
        layer: int,
        turn: int,
        group: KVGroup,
        keys: torch.Tensor,
        values: torch.Tensor,
        after: Sequence[Transfer],
    ) -> list[Transfer]:
        """All pages that got rows: full ones on to the file, the others to their tails."""
        pages, staging = _pages_of(group), self.stagings[turn]
        raw, tails = self.pool(layer, turn).raw, self._tails[layer].raw
        if self._backend.unified:
            SomeRows(tails, pages.kept_tails, pages.kept_places).scatter(raw)
            staging.leaving = self._write(layer, pages.written, staging.device, 0, after)
            return staging.leaving
        first, pinned = pages.num_full, self._pinned_out[turn]
        out = self._transfers.submit(
            Link.DEVICE_TO_HOST,
            raw[first : group.num_staged],
            SomeRows(tails, pages.kept_tails, pages.kept_places - first, pinned),
            kind="kv",
            after=[self._backend.record(), *self._kept[turn], *after],
        )
        staging.leaving = [out]
        # `after` again: these are other copies than the ones that `out` waited for.
        written = self._write(layer, pages.written, pinned, first, [out, *after])
        self._kept[turn] = [out, *written]
        return self._kept[turn]

    def _write(
        self,
        layer: int,
        runs: Sequence[Run],
        source: torch.Tensor,
        first: int,
        after: Sequence[Transfer],
    ) -> list[Transfer]:
        """From `source`, which holds the pages of staging from place `first` on."""
        if not runs:
            return []
        data = source.view(torch.uint8)
        copies = [
            (self._bytes(data, layer, run.place - first, run.count), self._extent(layer, run))
            for run in runs
        ]
        return [self._transfers.submit_to_disk(copies, kind="kv", after=after, priority=URGENT)]

    def _bytes(self, data: torch.Tensor, layer: int, place: int, count: int) -> torch.Tensor:
        size = self._page_bytes[layer]
        return data[place * size : (place + count) * size]

    def _extent(self, layer: int, run: Run) -> FileExtent:
        size = self._page_bytes[layer]
        assert self._file is not None
        return FileExtent(self._file, self._starts[layer] + run.page * size, run.count * size)

    def close(self) -> None:
        """Let go of all memory, and of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._backend.account.refund(Tier.DISK, self.nbytes)
        super().close()
        for each in (self._tails, self._pinned_in, self._pinned_out, self._kept):
            each.clear()


def _pages_of(group: KVGroup) -> DiskPages:
    assert group.on_disk is not None
    return group.on_disk


def _nameless_file(directory: Path, nbytes: int) -> DirectFile:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, f"creating {directory}") from error
    return DirectFile.create(directory / f"kv-{uuid.uuid4().hex}.bin", nbytes, nameless=True)
