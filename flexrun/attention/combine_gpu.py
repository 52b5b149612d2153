"""The Triton kernel that merges what attention made of the pieces of a row's keys."""

from __future__ import annotations

import triton
import triton.language as tl

from flexrun.attention.parts_gpu import LN_2, find_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_spans", "splits"])
def combine_kernel(
    part_out, part_lse, out, lse, first_row, num_rows, num_spans, splits,
    V: tl.constexpr, HEADS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr, LEAST_ROWS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of one row and one head, each weighted by the sum of its exponentials."""
    slots, slot, head = tl.num_programs(0), tl.program_id(0), tl.program_id(1)
    tile, local = slot // TILE_ROWS, slot % TILE_ROWS
    span, row, rows = find_tile(num_rows, num_spans, tile, TILE_ROWS, LEAST_ROWS, FLAT)
    if local >= rows:
        return
    column = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    top, total = float("-inf"), 0.0
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        places = (split.to(tl.int64) * slots + slot) * HEADS + head
        logs = tl.load(part_lse + places, mask=split < splits, other=float("-inf"))
        # What is empty was never written: it must not even be multiplied by zero.
        held = (logs > float("-inf"))[:, None] & (column < V)[None, :]
        parts = tl.load(part_out + places[:, None] * V + column[None, :], mask=held, other=0.0)
        new_top = tl.maximum(top, tl.max(logs, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2((logs - base) * LOG2_E)
        kept = tl.exp2((top - base) * LOG2_E)
        acc = acc * kept + tl.sum(parts * weights[:, None], 0)
        total = total * kept + tl.sum(weights, 0)
        top = new_top
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    place = (tl.load(first_row + span) + row + local).to(tl.int64) * HEADS + head
    tl.store(lse + place, tl.where(some, top + tl.log2(total) * LN_2, float("-inf")))
    tl.store(out + place * V + column, acc / total, mask=column < V)
