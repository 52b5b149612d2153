"""The token embedding, gathered where it lives: rows cross the links, never the table."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from offload.links import FileExtent, FileRows, Link, TensorRows
from offload.tiers import Tier
from offload.transfer import URGENT

if TYPE_CHECKING:
    from offload.backend import DeviceBackend
    from offload.slabs import Weight
    from offload.transfer import Transfer
    from offload.transfer_engine import TransferEngine


class EmbeddingTable:
    """Rows of an embedding table that is not on DEVICE, or not in the type that is computed in.

    `bind(token_ids)` makes a table of just the rows that occur the module's weight, and returns the
    ids into it, so that scaling and the like stay in the model's own code.
    """

    def __init__(
        self,
        weight: Weight,
        home: torch.Tensor | FileExtent,
        tier: Tier,
        backend: DeviceBackend,
        transfers: TransferEngine,
        rows: int,
    ) -> None:
        """`rows` is the most distinct ones of one call."""
        self._weight = weight
        self._home = home
        self._backend = backend
        self._transfers = transfers
        self._row_bytes = weight.nbytes // weight.shape[0]
        self._home_is_device = backend.unified or tier is Tier.DEVICE
        self._staging: torch.Tensor | None = None
        if not self._home_is_device and not (backend.unified and isinstance(home, FileExtent)):
            nbytes = min(rows, weight.shape[0]) * self._row_bytes
            self._staging = backend.allocate(Tier.HOST, nbytes, "staging for embedding rows")
        self._last: Transfer | None = None
        """What reads the staging."""

    def bind(self, token_ids: torch.Tensor, module: Any) -> torch.Tensor:
        """Ids [rows] into the compact table that is now `module`'s weight; ids are on the CPU.

        Compute submitted from now on sees the table. One call serves all rows of a sweep, so that
        a token id that occurs often, and the wait for the rows, cost once.
        """
        module.padding_idx = None  # an id of the full table, which only training needs
        unique, local = torch.unique(token_ids, return_inverse=True)
        rows = self._fetch(unique)
        dtype = self._weight.compute_dtype or self._weight.dtype
        shape = len(unique), *self._weight.shape[1:]
        table = torch.empty(shape, dtype=dtype, device=rows.device)
        self._weight.fill(table, rows)
        module._parameters["weight"] = torch.nn.Parameter(table, requires_grad=False)
        return local

    def _fetch(self, unique: torch.Tensor) -> torch.Tensor:
        if isinstance(self._home, torch.Tensor) and self._home_is_device:
            return self._home.view(-1, self._row_bytes)[unique.to(self._home.device)]
        nbytes = len(unique) * self._row_bytes
        device = torch.empty(nbytes, dtype=torch.uint8, device=self._backend.device)
        ready = self._backend.record()  # the memory may have been another tensor's until now
        self._last = self._send(unique, device, ready)
        self._last.wait()
        return device

    def _send(self, unique: torch.Tensor, device: torch.Tensor, ready: Any) -> Transfer:
        submit = partial(self._transfers.submit, kind="embedding", priority=URGENT)
        if isinstance(self._home, FileExtent):
            rows = FileRows(self._home, self._row_bytes, unique)
            if self._backend.unified:
                return submit(Link.DISK_TO_DEVICE, rows, device)
            assert self._staging is not None
            staging = self._staging[: device.nbytes]
            read = submit(Link.DISK_TO_HOST, rows, staging, after=[self._last])
            return submit(Link.HOST_TO_DEVICE, staging, device, after=[read, ready])
        source = TensorRows(self._home.view(-1, self._row_bytes), unique, staging=self._staging)
        target = device.view(-1, self._row_bytes)
        return submit(Link.HOST_TO_DEVICE, source, target, after=[self._last, ready])

    def close(self) -> None:
        """Give the staging back."""
        if self._staging is not None:
            self._backend.free(Tier.HOST, self._staging)
            self._staging = None
