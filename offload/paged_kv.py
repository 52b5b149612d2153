"""Keys and values of one layer, as pages in one piece of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class LayerShape(Protocol):
    """What one layer stores per token."""

    @property
    def kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys and values of one layer in one pool.

    `keys` [pages, kv_heads, page_tokens, key_dim] and `values` [pages, kv_heads, page_tokens,
    value_dim] are views of the same pages: a page's keys come first, then its values. Within a page
    one head's tokens are neighbours, so that gathered pages are ready for a batched product.
    """

    keys: torch.Tensor
    values: torch.Tensor
    raw: torch.Tensor
    """[pages, elements of one page]."""

    @classmethod
    def of(cls, data: torch.Tensor, shape: LayerShape, page_tokens: int) -> PagedKV:
        """As many pages of a layer of `shape` as fit into `data` (flat)."""
        size = page_elements(shape, page_tokens)
        raw = data[: data.numel() // size * size].view(-1, size)
        split = page_tokens * shape.kv_heads * shape.key_dim
        keys = raw[:, :split].unflatten(1, (shape.kv_heads, page_tokens, shape.key_dim))
        values = raw[:, split:].unflatten(1, (shape.kv_heads, page_tokens, shape.value_dim))
        return cls(keys, values, raw)

    def gather(
        self, pages: torch.Tensor, memo: dict[Any, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of B page tables: [B, P] -> two of [B, kv_heads, P * page_tokens, dim].

        `memo` keeps the row numbers for the other layers that read the same pages.
        """
        memo = {} if memo is None else memo
        _, kv_heads, page_tokens, dim = self.keys.shape
        if self.keys.shape != self.values.shape:
            heads = torch.arange(kv_heads, device=pages.device).view(1, -1, 1)
            place = pages.unsqueeze(1), heads
            return self.keys[place].flatten(2, 3), self.values[place].flatten(2, 3)
        # One row a head and page: rows are copied whole, much faster than elements by index.
        table = self.raw.view(-1, page_tokens * dim)
        if kv_heads not in memo:
            heads = torch.arange(2 * kv_heads, device=pages.device).view(2, 1, -1, 1)
            memo[kv_heads] = (pages.unsqueeze(1) * (2 * kv_heads) + heads).view(2, -1)
        shape = (len(pages), kv_heads, -1, dim)
        keys, values = (table.index_select(0, rows).view(shape) for rows in memo[kv_heads])
        return keys, values

    def store(
        self,
        pages: torch.Tensor,
        offsets: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        memo: dict[Any, torch.Tensor],
    ) -> None:
        """Put `keys` [n, kv_heads, key_dim] and `values` in slots `offsets` [n] of `pages` [n].

        `memo` keeps the row numbers for the other layers whose rows go to the same slots.
        """
        if self.keys.shape != self.values.shape:
            self.keys[pages, :, offsets] = keys
            self.values[pages, :, offsets] = values
            return
        _, kv_heads, page_tokens, dim = self.keys.shape
        if kv_heads not in memo:
            heads = torch.arange(2 * kv_heads, device=pages.device).view(2, 1, -1)
            first = (pages * (2 * kv_heads)).view(-1, 1) + heads
            memo[kv_heads] = (first * page_tokens + offsets.view(-1, 1)).view(2, -1)
        table = self.raw.view(-1, dim)
        for rows, new in zip(memo[kv_heads], (keys, values)):
            table.index_copy_(0, rows, new.reshape(-1, dim))


def page_elements(shape: LayerShape, page_tokens: int) -> int:
    """Values in one page of a layer of `shape`."""
    return page_tokens * shape.kv_heads * (shape.key_dim + shape.value_dim)
