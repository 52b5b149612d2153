"""How attention on a GPU is cut into programs: tiles of query rows, and pieces of their keys.

Only numbers that the host has go in, so that planning a launch never waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

STAGES = 5
"""Of a decode's pipeline: keys wait for their page's number, so that three hold one tile ahead."""
LEAST_PIECE = 256
"""Keys that a program should have at least, for merging pieces costs something as well."""
MOST_PROGRAMS = 8
"""Limit of a split, in multiples of the programs that fill the GPU: it bounds the scratch memory,
and the idle programs of spans that are shorter than the longest."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of one layer's attention."""

    count: int
    kv_heads: int
    key_dim: int
    value_dim: int
    element_size: int
    """Bytes of a number of the query: products are made in its type."""
    packed: int = 0
    """Values that share a scale, where keys and values are in groups of 4 bits."""

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.count // self.kv_heads

    @property
    def block_d(self) -> int:
        """Size of a key as the kernel holds it."""
        return self._block(self.key_dim)

    @property
    def block_v(self) -> int:
        """Size of a value as the kernel holds it."""
        return self._block(self.value_dim)

    def groups(self, dim: int) -> tuple[int, int]:
        """Groups of a packed row of `dim` values, and bytes of one, as the kernel holds them."""
        groups = next_power(-(-dim // self.packed))
        return groups, max(16, next_power(-(-min(dim, self.packed) // 2)))

    def _block(self, dim: int) -> int:
        return 2 * prod(self.groups(dim)) if self.packed else max(16, next_power(dim))


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes of what one program holds at a time: they decide on its shared memory and registers."""

    rows: int
    """Query rows times query heads of a KV head."""
    keys: int
    warps: int
    stages: int
    """Depth of the pipeline of loads."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one launch cuts its spans into tiles of query rows."""

    flat: bool
    """Any number of tiles a span; otherwise one for each span that fits into one."""
    count: int
    """Tiles, or a bound of their number: programs without one end at once."""
    rows: int
    """Query rows of a tile."""
    least_rows: int
    """Spans with fewer rows are left to another launch."""
    blocks: Blocks

    def split(
        self, kv_heads: int, processors: int, reach: int, total: int, forced: int | None = None
    ) -> tuple[int, int]:
        """Number of pieces that the keys of a tile are cut into, and the keys of a piece.

        `reach` is the most keys of one tile, `total` a bound of the keys of all of them. Pieces
        have one size: that balances spans of unequal length as well. `forced`: so many pieces.
        """
        fill = processors * (1 if self.flat else 4)  # programs that keep the GPU busy
        if forced is None:
            share = max(LEAST_PIECE, -(-total * kv_heads // fill))
            splits = max(1, (reach + share // 2) // share)  # rounded: not a small rest for itself
            splits = min(splits, max(1, MOST_PROGRAMS * fill // (self.count * kv_heads)))
        else:
            splits = forced
        piece = -(-reach // splits)
        piece = -(-piece // self.blocks.keys) * self.blocks.keys
        return -(-reach // piece), piece


@lru_cache(64)
def plan_tiles(
    heads: Heads, rows: int, num_spans: int, most_rows: int, hopper: bool
) -> tuple[Tiles, ...]:
    """The launches for `rows` rows in `num_spans` spans, of which the longest has `most_rows`."""
    small = _small_blocks(heads)
    if most_rows <= small.rows // heads.group:
        return (Tiles(False, num_spans, most_rows, 1, small),)
    large = _large_blocks(heads, most_rows, hopper)
    tile_rows = large.rows // heads.group
    if num_spans == 1:
        return (Tiles(True, -(-most_rows // tile_rows), tile_rows, 1, large),)
    # Single rows get small tiles of their own; what is left has two rows a span or more.
    num_long = max(1, min(num_spans, rows // 2))
    count = (rows + num_long * (tile_rows - 1)) // tile_rows
    count = min(count, num_long * -(-most_rows // tile_rows))
    return (Tiles(False, num_spans, 1, 1, small), Tiles(True, count, tile_rows, 2, large))


def _small_blocks(heads: Heads) -> Blocks:
    """For decoding: tiles of 16 KB of keys and values, so that a few programs fit side by side.

    Up to twice the keys if they are packed: they are small, but are expanded in registers.
    """
    row = (heads.block_d + heads.block_v) * heads.element_size // (2 if heads.packed else 1)
    most = 64 if heads.packed else 128
    keys = min(most, max(16, next_power(16384 // row + 1) // 2))  # rounded down to a power of two
    rows = max(16, next_power(heads.group))  # tensor cores take no fewer than 16
    return Blocks(rows, keys, warps=4 if rows <= 64 else 8, stages=STAGES)


def _large_blocks(heads: Heads, most_rows: int, hopper: bool) -> Blocks:
    """For chunks of prompts: as much as fits into registers and into the GPU's shared memory.

    That is 100 KB on RTX cards and 227 KB on Hopper.
    """
    widest = max(heads.block_d, heads.block_v)
    wide = widest > 128
    rows, keys, warps, stages = 128, 64, 8, 3
    if heads.element_size > 2:  # no tensor cores: it is the registers that count
        rows, keys = 32, 16 if widest > 64 else 32
    elif hopper:
        keys = 64 if wide else 128
    elif wide:
        rows, keys = 64, 32
    elif widest <= 64:
        warps = 4
    if heads.packed and hopper:
        keys = min(keys, 32 if wide else 64)
    elif heads.packed:  # every warp expands all keys: its part of a product is in its registers
        rows, keys = min(rows, 64), min(keys, 32)
        warps = 8 if wide or rows < 64 else 4
    fewer = max(16, next_power(most_rows * heads.group))
    if fewer < rows:
        rows, keys, warps = fewer, min(keys, 32 if wide else 64), 4
    return Blocks(max(rows, next_power(heads.group)), keys, warps, stages)


def next_power(number: int) -> int:
    """The smallest power of two that is not less than `number`."""
    return 1 << (number - 1).bit_length()
