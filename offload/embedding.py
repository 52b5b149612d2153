"""The token embedding, gathered where it lives: rows cross the links, never the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offload.links import FileExtent, FileRows, Link, TensorRows
from offload.tiers import Tier

if TYPE_CHECKING:
    from offload.backend import DeviceBackend
    from offload.transfer import TransferEngine
    from offload.weights import Weight


class EmbeddingTable:
    """Rows of an embedding table that is not on DEVICE.

    `bind(token_ids)` makes a table of just the rows that occur the module's weight, and returns the
    ids into it, so that scaling and the like stay in the model's own code.
    """

    def __init__(
        self,
        weight: Weight,
        home: torch.Tensor | FileExtent,
        backend: DeviceBackend,
        transfers: TransferEngine,
    ) -> None:
        self._weight = weight
        self._home = home
        self._backend = backend
        self._transfers = transfers
        self._row_bytes = weight.nbytes // weight.shape[0]
        self._staging: torch.Tensor | None = None

    def bind(self, token_ids: torch.Tensor, module: Any) -> torch.Tensor:
        """Ids [rows] into the compact table that is now `module`'s weight; both on the device."""
        module.padding_idx = None  # an id of the full table, which only training needs
        unique, local = torch.unique(token_ids, return_inverse=True)
        rows = self._fetch(unique)
        table = rows.view(self._weight.dtype).view(len(unique), *self._weight.shape[1:])
        module._parameters["weight"] = torch.nn.Parameter(table, requires_grad=False)
        return local.to(self._backend.device)

    def _fetch(self, unique: torch.Tensor) -> torch.Tensor:
        nbytes = len(unique) * self._row_bytes
        device = torch.empty(nbytes, dtype=torch.uint8, device=self._backend.device)
        if isinstance(self._home, FileExtent):
            source = FileRows(self._home, self._row_bytes, unique)
            if self._backend.unified:
                self._submit(Link.DISK_TO_DEVICE, source, device)
                return device
            staging = self._stage(nbytes)
            self._submit(Link.DISK_TO_HOST, source, staging)
            self._submit(Link.HOST_TO_DEVICE, staging, device)
            return device
        table = self._home.view(-1, self._row_bytes)
        target = device.view(-1, self._row_bytes)
        rows = TensorRows(table, unique, staging=self._stage(nbytes))
        self._submit(Link.HOST_TO_DEVICE, rows, target)
        return device

    def _submit(
        self, link: Link, source: FileRows | TensorRows | torch.Tensor, target: torch.Tensor
    ) -> None:
        # Rows are few and needed at once, so this waits; the staging is free again afterwards.
        after = [self._backend.record()]
        self._transfers.submit(
            link, source, target, kind="embedding", after=after, priority=0
        ).synchronize()

    def _stage(self, nbytes: int) -> torch.Tensor:
        if self._staging is None or self._staging.nbytes < nbytes:
            if self._staging is not None:
                self._backend.free(Tier.HOST, self._staging)
            self._staging = self._backend.allocate(Tier.HOST, nbytes, "staging for embedding rows")
        return self._staging[:nbytes]

    def close(self) -> None:
        """Give the staging back."""
        if self._staging is not None:
            self._backend.free(Tier.HOST, self._staging)
            self._staging = None
