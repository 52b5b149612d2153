"""Attention over paged keys and values on a GPU: launches of the Triton kernels.

Nothing here waits for the GPU. Triton is imported by the first call; ask `triton_available` before.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from flexrun.attention.tiles_gpu import Heads, Tiles, next_power, plan_tiles

if TYPE_CHECKING:
    from flexrun.paused_forward import AttentionOptions
    from offload.kv_layout import PagedSpans
    from offload.paged_kv import PagedKV

COMBINED = 16
"""Pieces that are merged at a time."""


@lru_cache
def triton_available() -> bool:
    """Triton is installed, so that `paged_attention` can be called. Does not import it."""
    return importlib.util.find_spec("triton") is not None


def paged_attention(
    query: torch.Tensor,
    pool: PagedKV,
    spans: PagedSpans,
    options: AttentionOptions,
    *,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows over those of their keys that lie in the given pages.

    query [rows, heads, key_dim], in any strides of which the last is 1; the rows' own keys are in
    their pages already. Returns the weighted values [rows, heads, value_dim], normalised over the
    visible keys, and the natural logarithm of the sum of the exponentials of the scores
    [rows, heads], both in float32: with them, results over several sets of pages merge exactly.
    Rows that see no key or are in no span get zeros and -inf. Sinks are left to the caller.
    `num_splits` overrides how many pieces the keys are cut into.
    """
    rows, count, key_dim = query.shape
    value_dim, groups = pool.value_dim, pool.format.groups
    assert query.stride(2) == 1
    for side in (pool.keys, pool.values):
        assert side.stride()[1:] == (pool.page_tokens * side.shape[3], side.shape[3], 1)
    assert options.scaling > 0
    assert groups is None or groups.bits == 4
    num_spans = len(spans.first_row)
    # Where each row is known to be in a span, the kernel writes all of them.
    covered = num_spans * spans.most_rows == rows and 1 in (num_spans, spans.most_rows)
    make = torch.empty if covered and len(spans.pages) else torch.zeros
    out = make(rows, count, value_dim, dtype=torch.float32, device=query.device)
    lse = out.new_full((rows, count), -math.inf)
    if rows and num_spans and len(spans.pages):
        sizes = count, pool.kv_heads, key_dim, value_dim, query.element_size()
        heads = Heads(*sizes, packed=groups.group if groups else 0)
        with torch.cuda.device_of(query):
            _, hopper = _device(query.device)
            for tiles in plan_tiles(heads, rows, num_spans, spans.most_rows, hopper):
                call = _Call(query, pool, spans, options, heads, tiles)
                call.run(out, lse, num_splits)
    return out, lse


@dataclass(frozen=True, slots=True)
class _Call:
    """One launch of the attention kernel, and of the one that merges its pieces."""

    query: torch.Tensor
    pool: PagedKV
    spans: PagedSpans
    options: AttentionOptions
    heads: Heads
    tiles: Tiles

    def run(self, out: torch.Tensor, lse: torch.Tensor, forced: int | None) -> None:
        """Write the rows of the tiles' spans into `out` and `lse`."""
        kv_heads, tiles = self.heads.kv_heads, self.tiles
        reach = self._reach()
        total = tiles.count * reach
        if not tiles.flat:
            total = min(total, len(self.spans.pages) * self.pool.page_tokens)
        processors, _ = _device(self.query.device)
        splits, piece = tiles.split(kv_heads, processors, reach, total, forced)
        if splits == 1:
            self._attend(out, lse, 1, piece)
            return
        slots = tiles.count * tiles.rows
        part_out = out.new_empty(splits, slots, *out.shape[1:])
        part_lse = lse.new_full((splits, slots, self.heads.count), -math.inf)
        self._attend(part_out, part_lse, splits, piece)
        self._combine(part_out, part_lse, out, lse)

    def _reach(self) -> int:
        """A bound of the keys of one tile, in whole pages."""
        keys = self.spans.most_pages * self.pool.page_tokens
        for limit in (self.options.sliding_window, self.options.chunk):
            if limit is not None:  # the pages at both ends may stick out
                keys = min(keys, self.tiles.rows + limit + 2 * self.pool.page_tokens)
        return max(1, keys)

    def _common(self) -> dict[str, Any]:
        return {
            "num_spans": len(self.spans.first_row),
            "V": self.heads.value_dim,
            "HEADS": self.heads.count,
            "TILE_ROWS": self.tiles.rows,
            "LEAST_ROWS": self.tiles.least_rows,
            "FLAT": self.tiles.flat,
        }

    def _attend(self, out: torch.Tensor, lse: torch.Tensor, splits: int, piece: int) -> None:
        kernel, special = self._packed() if self.heads.packed else self._plain()
        spans, options, blocks = self.spans, self.options, self.tiles.blocks
        grid = (self.tiles.count, self.heads.kv_heads)
        factor, inner = _factors(options)
        kernel[(*(grid if self.tiles.flat else grid[::-1]), splits)](
            self.query,
            self.pool.keys,
            self.pool.values,
            out,
            lse,
            spans.first_row,
            spans.num_rows,
            spans.first_position,
            spans.table_start,
            spans.pages,
            spans.indices,
            piece=piece,
            factor=factor,
            inner=inner,
            query_row=self.query.stride(0),
            query_head=self.query.stride(1),
            key_page=self.pool.keys.stride(0),
            value_page=self.pool.values.stride(0),
            D=self.heads.key_dim,
            G=self.heads.group,
            PAGE_TOKENS=self.pool.page_tokens,
            BLOCK_M=blocks.rows,
            BLOCK_N=blocks.keys,
            WINDOW=options.sliding_window or 0,
            CHUNK=options.chunk or 0,
            CAPPED=options.softcap is not None,
            SPLIT=splits > 1,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            **special,
            **self._common(),
        )

    def _plain(self) -> tuple[Any, dict[str, Any]]:
        """The kernel for pages that hold keys and values as they are, and what only it takes."""
        from flexrun.attention.kernel_gpu import INTERPRETED, attention_kernel

        # The interpreter takes the product of bfloat16 matrices for one of integers.
        blocks = {"BLOCK_D": self.heads.block_d, "BLOCK_V": self.heads.block_v}
        return attention_kernel, blocks | {"UPCAST": INTERPRETED}

    def _packed(self) -> tuple[Any, dict[str, Any]]:
        """The kernel for pages of packed rows, and what only it takes."""
        from flexrun.attention.kernel_gpu import INTERPRETED
        from flexrun.attention.packed_gpu import packed_kernel

        assert self.pool.format.groups is not None
        numbers = self.pool.format.groups.numbers
        kind = getattr(torch, numbers)
        sides = self.pool.keys, self.pool.values
        if all(part % 4 == 0 for side in sides for part in (side.data_ptr(), *side.stride()[:3])):
            kind = torch.int32
        key_groups, key_half = self.heads.groups(self.heads.key_dim)
        value_groups, value_half = self.heads.groups(self.heads.value_dim)
        return packed_kernel, {
            "key_numbers": sides[0].view(kind),
            "value_numbers": sides[1].view(kind),
            "nibble": 15,
            "FLOAT16": numbers == "float16",
            "GROUP": self.heads.packed,
            "KEY_GROUPS": key_groups,
            "KEY_HALF": key_half,
            "VALUE_GROUPS": value_groups,
            "VALUE_HALF": value_half,
            "UPCAST": INTERPRETED,
        }

    def _combine(
        self, part_out: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        from flexrun.attention.combine_gpu import combine_kernel

        splits, slots, heads = part_lse.shape
        rows = self.spans.first_row, self.spans.num_rows
        combine_kernel[(slots, heads)](
            part_out,
            part_lse,
            out,
            lse,
            *rows,
            splits=splits,
            BLOCK_V=max(16, next_power(self.heads.value_dim)),
            BLOCK_SPLITS=COMBINED,
            **self._common(),
        )


def _factors(options: AttentionOptions) -> tuple[float, float]:
    """What a score is multiplied by to be an exponent of 2, and before that, to go into tanh."""
    log2_e = math.log2(math.e)
    if options.softcap is None:
        return options.scaling * log2_e, 0.0
    return options.softcap * log2_e, 2 * options.scaling / options.softcap * log2_e


@lru_cache
def _device(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors of a GPU, and whether it is of the Hopper generation; 1 for a CPU."""
    if device.type != "cuda":
        return 1, False
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major == 9
