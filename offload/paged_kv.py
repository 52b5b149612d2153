"""Keys and values of one layer, as pages in one piece of memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from compression.expansion import expand

if TYPE_CHECKING:
    from compression.spec import GroupFormat


class LayerShape(Protocol):
    """What one layer stores per token."""

    @property
    def kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys and values are stored: as rows of cells, one for each token and head."""

    dtype: torch.dtype
    """That they are computed with, …"""
    groups: GroupFormat | None = None
    """… and stored with, unless in groups of few bits, whose rows are bytes."""

    @property
    def cells(self) -> torch.dtype:
        """Type of a cell."""
        return self.dtype if self.groups is None else torch.uint8

    @property
    def rotated(self) -> bool:
        """Keys and values are stored as `compression.rotation` turns them, all of one pool alike.

        So queries have to be turned for them, and what attention gives has to be turned back.
        """
        return self.groups is not None

    def row(self, dim: int) -> int:
        """Cells of the `dim` values of one token and head."""
        return dim if self.groups is None else self.groups.row_bytes(dim)

    def page(self, shape: LayerShape, page_tokens: int) -> int:
        """Cells of one page of a layer of `shape`."""
        row = self.row(shape.key_dim) + self.row(shape.value_dim)
        return page_tokens * shape.kv_heads * row

    def page_bytes(self, shape: LayerShape, page_tokens: int) -> int:
        """Bytes of the same."""
        return self.page(shape, page_tokens) * self.cells.itemsize


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys and values of one layer in one pool.

    `keys` [pages, kv_heads, page_tokens, cells of a key] and `values` likewise are views of the
    same pages: a page's keys come first, then its values. Within a page one head's tokens are
    neighbours, so that gathered pages are ready for a batched product. Unless they are stored in
    groups of few bits, the cells are the `key_dim` and `value_dim` values themselves.
    """

    keys: torch.Tensor
    values: torch.Tensor
    raw: torch.Tensor
    """[pages, cells of one page]."""
    table: torch.Tensor | None
    """If keys and values are of one size: [rows, cells], each of one token's keys or values of one
    head, in the order in which they lie there."""
    format: KVFormat
    key_dim: int
    value_dim: int

    @classmethod
    def of(
        cls, data: torch.Tensor, shape: LayerShape, page_tokens: int, form: KVFormat | None = None
    ) -> PagedKV:
        """As many pages of a layer of `shape` as fit into `data` (flat, contiguous)."""
        assert data.is_contiguous()  # kernels are given its address
        form = form or KVFormat(data.dtype)
        assert data.dtype == form.cells
        size = form.page(shape, page_tokens)
        raw = data[: data.numel() // size * size].view(-1, size)
        key, value = form.row(shape.key_dim), form.row(shape.value_dim)
        split = page_tokens * shape.kv_heads * key
        keys = raw[:, :split].unflatten(1, (shape.kv_heads, page_tokens, key))
        values = raw[:, split:].unflatten(1, (shape.kv_heads, page_tokens, value))
        table = raw.view(-1, key) if shape.key_dim == shape.value_dim else None
        return cls(keys, values, raw, table, form, shape.key_dim, shape.value_dim)

    @property
    def kv_heads(self) -> int:
        """Heads that have keys and values."""
        return self.keys.shape[1]

    @property
    def page_tokens(self) -> int:
        """Positions of a page."""
        return self.keys.shape[2]

    @property
    def page_bytes(self) -> int:
        """Of one page."""
        return self.raw.shape[1] * self.raw.itemsize

    def gather(
        self, pages: torch.Tensor, memo: dict[Any, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of B page tables: [B, P] -> two of [B, kv_heads, P * page_tokens, dim].

        They are expanded if they are stored in few bits. `memo` keeps the row numbers for the other
        layers that read the same pages.
        """
        keys, values = self._gather_cells(pages, {} if memo is None else memo)
        if self.format.groups is None:
            return keys, values
        return self._expanded(keys, self.key_dim), self._expanded(values, self.value_dim)

    def _expanded(self, cells: torch.Tensor, dim: int) -> torch.Tensor:
        """Values [..., dim] of rows [..., bytes]."""
        assert self.format.groups is not None
        out = torch.empty(*cells.shape[:-1], dim, dtype=self.format.dtype, device=cells.device)
        expand(cells.view(-1, cells.shape[-1]), self.format.groups, out.view(-1, dim))
        return out

    def _gather_cells(
        self, pages: torch.Tensor, memo: dict[Any, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as they are stored."""
        _, kv_heads, page_tokens, dim = self.keys.shape
        if self.table is None:
            heads = torch.arange(kv_heads, device=pages.device).view(1, -1, 1)
            place = pages.unsqueeze(1), heads
            return self.keys[place].flatten(2, 3), self.values[place].flatten(2, 3)
        # One row a head and page: rows are copied whole, much faster than elements by index.
        table = self.table.view(-1, page_tokens * dim)
        if kv_heads not in memo:
            heads = torch.arange(2 * kv_heads, device=pages.device).view(2, 1, -1, 1)
            memo[kv_heads] = (pages.unsqueeze(1) * (2 * kv_heads) + heads).view(2, -1)
        shape = (len(pages), kv_heads, -1, dim)
        keys, values = (table.index_select(0, rows).view(shape) for rows in memo[kv_heads])
        return keys, values

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """New `keys` [n, kv_heads, key_dim] and `values` as one tensor, the form of `store`.

        That is rows of the `table`, first the keys', or else both along the last dimension.
        """
        if self.table is None:
            return torch.cat([keys, values], 2)
        return torch.cat([keys, values]).view(-1, keys.shape[2])

    def store(self, slots: TokenSlots, packed: torch.Tensor) -> None:
        """Put `packed` keys and values of n rows into `slots`."""
        _, kv_heads, page_tokens, dim = self.keys.shape
        if self.table is None:
            self.keys[slots.pages, :, slots.offsets] = packed[..., :dim]
            self.values[slots.pages, :, slots.offsets] = packed[..., dim:]
        else:
            self.table.index_copy_(0, slots.rows(kv_heads, page_tokens), packed)


@dataclass(frozen=True, slots=True)
class TokenSlots:
    """Where the keys and values of n rows go: slot `offsets` [n] of `pages` [n]."""

    pages: torch.Tensor
    offsets: torch.Tensor
    _memo: dict[int, torch.Tensor] = field(default_factory=dict)

    def rows(self, kv_heads: int, page_tokens: int) -> torch.Tensor:
        """[2 * n * kv_heads] where they go in a pool's `table`.

        Kept for the other layers, whose rows go to the same slots.
        """
        if kv_heads not in self._memo:
            heads = torch.arange(2 * kv_heads, device=self.pages.device).view(2, 1, -1)
            first = (self.pages * (2 * kv_heads)).view(-1, 1) + heads
            self._memo[kv_heads] = (first * page_tokens + self.offsets.view(-1, 1)).view(-1)
        return self._memo[kv_heads]
