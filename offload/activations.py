"""Activations of waiting micro-batches on HOST: they leave the device while others compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from offload.links import Link
from offload.tiers import Tier
from offload.transfer import URGENT

if TYPE_CHECKING:
    from offload.backend import DeviceBackend
    from offload.tiers import Split
    from offload.transfer import Transfer
    from offload.transfer_engine import TransferEngine

MOST_LEAVING = 2
"""Micro-batches that are on their way to HOST at the same time."""


@dataclass(slots=True)
class _Parked:
    """The hidden states of one micro-batch between two layers."""

    hidden: torch.Tensor
    home: torch.Tensor
    out: Transfer
    freed: bool = False
    back: Transfer | None = None


class ActivationStore:
    """Room on HOST for the hidden states of those micro-batches that a split sends there.

    The model's own code holds the hidden states in its variables, so it is their storage that is
    emptied and filled again: every reference to them stays valid.
    """

    def __init__(
        self,
        split: Split,
        rows: int,
        row_bytes: int,
        backend: DeviceBackend,
        transfers: TransferEngine,
    ) -> None:
        self._row_bytes = row_bytes
        self._share = 0.0 if backend.unified else split.fraction(Tier.HOST)
        self._backend = backend
        self._transfers = transfers
        self._parked: dict[int, _Parked] = {}
        self._last_out: dict[int, Transfer] = {}
        """By micro-batch: what wrote its place on HOST last."""
        self._earlier_out: list[Transfer] = []
        """The same of the last sweep that had any: its places may overlap those of this one."""
        self._room: torch.Tensor | None = None
        if self._share:
            what = "activations of waiting micro-batches"
            self._room = backend.allocate(Tier.HOST, rows * row_bytes, what)
        self._places: list[tuple[int, int]] = []

    def begin(self, rows: list[int]) -> None:
        """Choose the micro-batches, of so many rows each, whose hidden states wait on HOST."""
        sizes = [count * self._row_bytes for count in rows]
        self.end()
        self._places = []
        wanted = chosen = 0.0
        room = 0 if self._room is None else self._room.nbytes
        place = 0
        for nbytes in sizes:
            wanted += nbytes * self._share
            # As in error diffusion: each choice makes up for what the ones before were off.
            take = len(sizes) > 1 and wanted - chosen >= nbytes / 2 and place + nbytes <= room
            self._places.append((place, nbytes if take else 0))
            if take:
                chosen += nbytes
                place += nbytes

    def store(self, number: int, hidden: torch.Tensor) -> Transfer | None:
        """The micro-batch waits: send its hidden states to HOST, if they are to live there."""
        self._free_stored()
        place, nbytes = self._places[number]
        if not nbytes or hidden.nbytes != nbytes or not _owns_storage(hidden):
            return None
        self._bound_leaving()
        assert self._room is not None
        home = self._room[place : place + nbytes]
        out = self._transfers.submit(
            Link.DEVICE_TO_HOST,
            hidden.detach().view(-1).view(torch.uint8),
            home,
            kind="activations",
            after=[self._backend.record(), self._last_out.get(number), *self._earlier_out],
            priority=URGENT,
        )
        self._last_out[number] = out
        self._parked[number] = _Parked(hidden, home, out)
        return out

    def _bound_leaving(self) -> None:
        """The device has room for a few that are on their way out, not for all."""
        leaving = [p for p in self._parked.values() if not p.freed and p.back is None]
        if len(leaving) >= MOST_LEAVING:
            leaving[0].out.synchronize()
            self._free_stored()

    def fetch(self, number: int) -> Transfer | None:
        """The micro-batch is next: bring its hidden states back."""
        self._free_stored()
        parked = self._parked.get(number)
        if parked is None or parked.back is not None:
            return None
        if not parked.freed:
            del self._parked[number]  # still there: what is on its way to HOST is not needed
            return parked.out
        storage = parked.hidden.untyped_storage()
        storage.resize_(parked.home.nbytes)
        parked.back = self._transfers.submit(
            Link.HOST_TO_DEVICE,
            parked.home,
            parked.hidden.detach().view(-1).view(torch.uint8),
            kind="activations",
            after=[parked.out, self._backend.record()],
            priority=URGENT,
        )
        return parked.back

    def arrive(self, number: int) -> None:
        """Compute submitted from now on sees the hidden states."""
        parked = self._parked.pop(number, None)
        if parked is None:
            return
        assert parked.back is not None, "hidden states were not fetched"
        parked.back.wait()

    def _free_stored(self) -> None:
        """Empty the storages whose copies are issued."""
        for parked in self._parked.values():
            if not parked.freed and parked.back is None and parked.out.issued:
                parked.out.check()
                # The device reuses the memory only when the copy is over: copies record that.
                parked.hidden.untyped_storage().resize_(0)
                parked.freed = True

    def end(self) -> None:
        """The sweep is over or was broken off."""
        # Hidden states that were wanted back before they had left may still be leaving. Each copy
        # of this sweep follows all of the one before: to wait for these is to wait for those, too.
        if self._last_out:
            self._earlier_out = list(self._last_out.values())
        self._parked.clear()
        self._last_out.clear()

    def close(self) -> None:
        """Give the memory back."""
        if self._room is not None:
            self._backend.free(Tier.HOST, self._room)
            self._room = None


def _owns_storage(hidden: torch.Tensor) -> bool:
    return hidden.is_contiguous() and hidden.untyped_storage().nbytes() == hidden.nbytes
