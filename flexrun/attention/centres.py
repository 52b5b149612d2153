"""What keys and values of packed pages are stored without, and what that changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from flexrun.attention.state import Rows
    from flexrun.paused_forward import AttentionOptions


@dataclass(frozen=True, slots=True)
class Centres:
    """Of each row's sequence: a vector that was taken from all of its packed keys, and values."""

    keys: torch.Tensor
    """[n, kv_heads, key_dim]"""
    values: torch.Tensor
    """[n, kv_heads, value_dim]"""

    def undone(
        self,
        query: torch.Tensor,
        rows: Rows,
        out: torch.Tensor,
        lse: torch.Tensor,
        options: AttentionOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [some rows, H, V] and log-sum-exp [some rows, H] of keys and values as they were.

        All scores of a row are lower by the product of its query [H, n, key_dim] with the centre:
        weights are the same, and add up to one. With a soft cap keys must have centres of zero.
        """
        kv_heads = self.keys.shape[1]
        asked = query[:, rows].transpose(0, 1).float().unflatten(1, (kv_heads, -1))
        lower = torch.matmul(asked, self.keys[rows].float().unsqueeze(-1)).flatten(1)
        group = asked.shape[2]
        values = self.values[rows].float().repeat_interleave(group, dim=1)
        return out + values, lse + lower * options.scaling
