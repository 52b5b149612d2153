"""KV pages on disk: full pages in a file, each sequence's last one, while it fills, in RAM."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import torch

from offload.direct_file import DirectFile, file_error
from offload.disk_layout import kv_file_layout
from offload.kv_moves import Run
from offload.kv_staging import StagedPages, Visit
from offload.links import FileExtent, Link, SomeRows
from offload.ram import map_memory
from offload.tiers import DISK_BLOCK, Tier
from offload.transfer import URGENT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from offload.kv_layout import KVGroup
    from offload.kv_moves import DiskMoves
    from offload.transfer import Transfer


class DiskPages(StagedPages):
    """One file for all layers, read ahead and appended in whole pages.

    The file has no name, so that nothing is left of it however the process ends. A sequence's pages
    are neighbours as far as the pool allows it, and are read as one. Nothing in the file has to be
    erased: a page is only read after all of it was written by its owner.
    """

    tier = Tier.DISK

    def __init__(self, directory: Path, pages: int, tails: int, *arguments: Any) -> None:
        """`pages` on disk, and the unfinished pages of up to `tails` sequences."""
        super().__init__(*arguments)
        memory = self._memory
        self._page_bytes = [
            memory.format.page_bytes(shape, memory.page_tokens) for shape in memory.shapes
        ]
        ram = Tier.DEVICE if self._backend.unified else Tier.HOST
        self._tails = memory.pools(ram, tails, "KV pages that are not full") if tails else []
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

    def fetch(self, visit: Visit) -> list[Transfer]:
        """Full pages over the disk's link, the others from RAM."""
        layer, moves, transfers = visit.layer, _moves_of(visit.group), []
        if moves.read:
            staging = self.stagings[visit.turn].device.view(torch.uint8)
            copies = [
                (self._extent(layer, run), self._bytes(staging, layer, run.place, run.count))
                for run in moves.read
            ]
            after = self._before_fetch(visit)
            transfers.append(
                self._transfers.submit_from_disk(copies, kind="kv", after=after, priority=URGENT)
            )
        if len(moves.tails) and not self._backend.unified:
            tails = self._tails[layer].raw
            transfers.append(self._gather(visit, tails, moves.tails, moves.num_full))
        return transfers

    def arrive(self, visit: Visit) -> None:
        """Where RAM is the device's memory, pages that are not full come now."""
        super().arrive(visit)
        group, moves = visit.group, _moves_of(visit.group)
        if len(moves.tails) and self._backend.unified:
            raw = self.pool(visit.layer, visit.turn).raw
            target = raw[moves.num_full : group.num_filled]
            torch.index_select(self._tails[visit.layer].raw, 0, moves.tails, out=target)

    def keep(self, visit: Visit, packed: torch.Tensor) -> list[Transfer]:
        """All pages that got rows: full ones on to the file, the others to their tails."""
        moves, staging = _moves_of(visit.group), self.stagings[visit.turn]
        raw, tails = self.pool(visit.layer, visit.turn).raw, self._tails[visit.layer].raw
        if self._backend.unified:
            SomeRows(tails, moves.kept_tails, moves.kept_places).scatter(raw)
            staging.leaving = self._write(visit, staging.device, 0, visit.after)
            return staging.leaving
        assert staging.pinned_out is not None
        first = moves.num_full
        kept = SomeRows(tails, moves.kept_tails, moves.kept_places - first, staging.pinned_out)
        out = self._scatter(visit, raw[first : visit.group.num_staged], kept)
        staging.leaving = [out]
        # What comes after `out` comes after all that it waited for.
        staging.kept = [out, *self._write(visit, staging.pinned_out, first, [out])]
        return staging.kept

    def keep_pages(
        self, visit: Visit, packed: torch.Tensor, numbers: torch.Tensor
    ) -> list[Transfer]:
        """As many at a time as staging has room for; straight to the file where RAM is the device's
        memory.
        """
        if self._backend.unified:
            self._make_way()
            data = map_memory(packed.nbytes, huge_pages=False)  # direct I/O wants whole blocks
            data.copy_(packed.view(-1))
            self._leaving.append(self._write_pages(visit, data, numbers, visit.after))
            return [self._leaving[-1]]
        staging = self.stagings[visit.turn]
        sent: list[Transfer] = []
        assert staging.pinned_out is not None
        room = staging.pinned_out.nbytes // packed.shape[1]
        for pages, places in zip(packed.split(room), numbers.split(room)):
            self._make_way()
            out = self._transfers.submit(
                Link.DEVICE_TO_HOST,
                pages.view(-1),
                staging.pinned_out[: pages.nbytes],
                kind="kv",
                after=[self._backend.record(), *staging.kept, *visit.after],
            )
            self._leaving.append(out)
            staging.kept = [out, self._write_pages(visit, staging.pinned_out, places, [out])]
            sent += staging.kept
        return sent

    def _write_pages(
        self, visit: Visit, data: torch.Tensor, numbers: torch.Tensor, after: Sequence[Transfer]
    ) -> Transfer:
        """Pages that lie one after another in `data`."""
        pairs = enumerate(numbers.tolist())
        copies = [
            (self._bytes(data, visit.layer, place, 1), self.page(visit.layer, number))
            for place, number in pairs
        ]
        return self._transfers.submit_to_disk(copies, kind="kv", after=after, priority=URGENT)

    def _write(
        self, visit: Visit, source: torch.Tensor, first: int, after: Sequence[Transfer]
    ) -> list[Transfer]:
        """The pages that became full, from `source`: staging from place `first` on."""
        layer, data = visit.layer, source.view(torch.uint8)
        copies = [
            (self._bytes(data, layer, run.place - first, run.count), self._extent(layer, run))
            for run in _moves_of(visit.group).written
        ]
        if not copies:
            return []
        return [self._transfers.submit_to_disk(copies, kind="kv", after=after, priority=URGENT)]

    def page(self, layer: int, number: int) -> FileExtent:
        """A full page in the file."""
        return self._extent(layer, Run(number, 0, 1))

    def tail(self, layer: int, number: int) -> torch.Tensor:
        """A page that is not full, in RAM: uint8."""
        return self._tails[layer].raw[number].view(torch.uint8)

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
        self._tails.clear()


def _moves_of(group: KVGroup) -> DiskMoves:
    assert group.on_disk is not None
    return group.on_disk


def _nameless_file(directory: Path, nbytes: int) -> DirectFile:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, f"creating {directory}") from error
    return DirectFile.create(directory / f"kv-{uuid.uuid4().hex}.bin", nbytes, nameless=True)
