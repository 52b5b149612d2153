"""Where weights on DISK are read from: the checkpoint itself, or a prepared store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from offload.direct_file import DirectFile
from offload.disk_layout import DiskPlace
from offload.links import FileExtent
from offload.prepared import model_key, prepare, store_path
from offload.prepared_layout import PREPARED_BLOCK, WEIGHTS, layout
from offload.tiers import DISK_BLOCK, Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

    import torch

    from offload.safetensors_file import StoredTensor
    from offload.slabs import DiskSource, Weight
    from offload.tiers import MemoryAccount


class TensorSource(Protocol):
    """Where weights come from: a checkpoint, or a model in memory."""

    def load(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and values of each of `names`."""
        ...

    def in_place(self, names: Collection[str]) -> dict[str, StoredTensor] | None:
        """Where the bytes of `names` lie in files; None unless all can be used as they are."""
        ...

    def fingerprint(self) -> bytes:
        """Changes with the tensors."""
        ...

    def check_unchanged(self) -> None:
        """Raise an error if the tensors are not the ones that were described."""
        ...


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Where each weight lies, or will lie once there is a prepared store."""

    places: dict[str, DiskPlace]
    to_write: int
    """Bytes that the offload directory has to take; 0 where the files are there already."""
    open: Callable[[], DiskSource]
    """Opens the files, and writes the prepared store if that is still to be done."""


def plan_disk(source: TensorSource, units: Sequence[Sequence[Weight]], directory: Path) -> DiskPlan:
    """Prefer a prepared store that is there, then the checkpoint itself, then prepare one."""
    key = model_key(source.fingerprint(), units)
    path = store_path(directory, key)
    tensors = None if path.exists() else usable_in_place(source, units)
    if tensors is not None:
        places = {
            name: DiskPlace(str(tensor.path), tensor.offset, tensor.nbytes, DISK_BLOCK)
            for name, tensor in tensors.items()
        }
        return DiskPlan(places, 0, lambda: InPlaceWeights(tensors, source))
    offsets, nbytes = layout(units)
    file = str(path / WEIGHTS)
    places = {
        weight.name: DiskPlace(file, offsets[weight.name], weight.nbytes, PREPARED_BLOCK)
        for unit in units
        for weight in unit
    }
    return DiskPlan(
        places,
        0 if path.exists() else nbytes,
        lambda: prepare(directory, key, source, units, source.check_unchanged),
    )


def usable_in_place(
    source: TensorSource, units: Sequence[Sequence[Weight]]
) -> dict[str, StoredTensor] | None:
    """Where the bytes of all weights lie in the source's files; None unless all are usable."""
    weights = [weight for unit in units for weight in unit]
    if any(weight.spec is not None for weight in weights):
        return None
    return source.in_place([weight.name for weight in weights])


def open_charged(plan: DiskPlan, account: MemoryAccount) -> DiskSource:
    """Open what `plan` says; what has to be written is charged to the DISK budget."""
    account.charge(Tier.DISK, plan.to_write, "the prepared weights")
    try:
        return plan.open()
    except BaseException:
        account.refund(Tier.DISK, plan.to_write)
        raise


class InPlaceWeights:
    """A checkpoint's own files, open to be read past the page cache."""

    def __init__(self, tensors: dict[str, StoredTensor], source: TensorSource) -> None:
        self._tensors = tensors
        self._files: dict[Path, DirectFile] = {}
        try:
            for tensor in tensors.values():
                if tensor.path not in self._files:
                    self._files[tensor.path] = DirectFile.open(tensor.path)
            source.check_unchanged()  # the headers were read a while ago
        except BaseException:
            self.close()
            raise

    def extent(self, name: str) -> FileExtent:
        """The exact bytes of weight `name`."""
        tensor = self._tensors[name]
        return FileExtent(self._files[tensor.path], tensor.offset, tensor.nbytes)

    def check_unchanged(self) -> None:
        """Raise `OffloadStoreError` if someone writes to the checkpoint."""
        for file in self._files.values():
            file.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
