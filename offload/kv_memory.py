"""The memory that KV pages of all layers lie in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload.paged_kv import KVFormat, PagedKV

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from offload.backend import DeviceBackend
    from offload.paged_kv import LayerShape
    from offload.tiers import Tier


class KVMemory:
    """Takes it from the backend, and gives all of it back."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        form: KVFormat,
        page_tokens: int,
        backend: DeviceBackend,
    ) -> None:
        """Pages of `page_tokens` positions are stored as `form` says, in layers of `shapes`."""
        self.shapes = shapes
        self.format = form
        self.page_tokens = page_tokens
        self.backend = backend
        self.page_bytes = sum(form.page_bytes(shape, page_tokens) for shape in shapes)
        """Of one page in all layers."""
        self._homes: list[tuple[Tier, torch.Tensor]] = []
        self._charged: list[tuple[Tier, int]] = []

    def allocate(self, tier: Tier, cells: torch.dtype, count: int, what: str) -> torch.Tensor:
        """So many cells, all zero. Raises `CapacityError`."""
        home = self.backend.allocate(tier, count * cells.itemsize, what)
        self._homes.append((tier, home))
        # Slots that hold no token yet are read and weighted with zero: they must not hold NaN.
        return home.zero_().view(cells)

    def pools(
        self,
        tier: Tier,
        pages: int,
        what: str,
        form: KVFormat | None = None,
        page_tokens: int | None = None,
    ) -> list[PagedKV]:
        """By layer, charged whole; stored otherwise, or with other pages, if that is given."""
        form, tokens = form or self.format, page_tokens or self.page_tokens
        counts = [pages * form.page(shape, tokens) for shape in self.shapes]
        if tier in self.backend.lazy:
            nbytes = sum(counts) * form.cells.itemsize
            self.backend.account.charge(tier, nbytes, what)
            self._charged.append((tier, nbytes))
            return self._reserved(pages, form, tokens)
        return [
            PagedKV.of(self.allocate(tier, form.cells, count, what), shape, tokens, form)
            for count, shape in zip(counts, self.shapes)
        ]

    def home(self, tier: Tier, pages: int) -> list[PagedKV]:
        """Pools by layer that sequences get pages of: see `charge`."""
        if tier in self.backend.lazy:
            return self._reserved(pages, self.format, self.page_tokens)
        return self.pools(tier, pages, "the KV cache")

    def _reserved(self, pages: int, form: KVFormat, tokens: int) -> list[PagedKV]:
        """Pools whose memory is taken when it is first written."""
        reserved = [
            self.backend.reserve(pages * form.page_bytes(shape, tokens)) for shape in self.shapes
        ]
        return [
            PagedKV.of(data.view(form.cells), shape, tokens, form)
            for data, shape in zip(reserved, self.shapes)
        ]

    def charge(self, tier: Tier, pages: int) -> None:
        """Where memory is taken when it is written, that of pages taken or (negative) given back.

        Elsewhere a whole pool was charged.
        """
        if tier not in self.backend.lazy:
            return
        nbytes = pages * self.page_bytes
        if nbytes > 0:
            self.backend.account.charge(tier, nbytes, "the KV cache")
        else:
            self.backend.account.refund(tier, -nbytes)

    def close(self) -> None:
        """Give all of it back."""
        for tier, home in self._homes:
            self.backend.free(tier, home)
        self._homes.clear()
        for tier, nbytes in self._charged:
            self.backend.account.refund(tier, nbytes)
        self._charged.clear()
