"""What the KV cache takes of every tier, pages and what moves them (no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload.disk_layout import kv_file_layout
from offload.errors import CapacityError
from offload.tiers import (
    BROKEN_OFF,
    BUDGET_FLAG,
    DISK_BLOCK,
    HOSTED_TURNS,
    LEAVING_BATCHES,
    PACKED_PAGES,
    Tier,
    format_size,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy

SWAP_OF_PAGES, SWAP_OF_FREE, MOST_SWAP_BYTES = 0.25, 0.5, 4 << 30
"""Most pages for sequences that wait: of those of running ones, of the tier's free memory, and in
bytes: it is a reserve, and a file that is written whole."""
LAZY_FILL = 0.9
"""Share of the room on DISK or a lazy tier that KV pages may take."""


def kv_room(
    shape: ModelShape,
    policy: Policy,
    free: Mapping[Tier, int],
    context_length: int,
    *,
    unified: bool,
    lazy: Collection[Tier] = (),
) -> tuple[dict[Tier, int], int]:
    """Bytes per tier that KV pages may take of `free`, and the pages of one staging buffer.

    Pages on DISK, or on a HOST that is not the device's memory, pass through two buffers on the
    device, each with two on HOST. A sequence has to fit into one. Beside pages that live on the
    device the buffers take at most half of what is free there. On HOST it is half where there are
    pages on HOST and on DISK; without DISK, buffers for as many pages as there is room for then.
    Pages on DISK, or on `lazy` tiers, whose memory is taken when it is first written, leave a part
    of the room to others.
    """
    room = dict(free)
    room[Tier.HOST] -= embedding_rows(shape, policy, unified)
    staging = 0
    if staged_tiers(policy, unified):
        besides = kv_working(shape, policy, 0, unified)
        each_takes = _bytes_of_staging(shape, policy, unified)
        most = min((room[tier] - besides[tier]) // n for tier, n in each_takes.items())
        staging = max(1, min(most, -(-context_length // policy.page_tokens)))
    for tier, nbytes in kv_working(shape, policy, staging, unified).items():
        room[tier] -= nbytes
    # The file of pages on DISK is reserved whole; results are written to that disk, too.
    for tier in (*lazy, Tier.DISK):
        room[tier] = int(room[tier] * LAZY_FILL)
    return {tier: max(0, nbytes) for tier, nbytes in room.items()}, staging


def _bytes_of_staging(shape: ModelShape, policy: Policy, unified: bool) -> dict[Tier, int]:
    """Bytes that have to be free on a tier for every page of a staging buffer."""
    buffer = staged_tiers(policy, unified) * max(shape.kv_bytes_per_token) * policy.page_tokens
    needed = {Tier.DEVICE: (4 if policy.kv_cache.device else 2) * buffer}
    if not unified:
        needed[Tier.HOST] = (8 if policy.kv_cache.host and policy.kv_cache.disk else 4) * buffer
        if policy.kv_cache.host and not policy.kv_cache.disk:
            needed[Tier.HOST] += shape.kv_token_bytes * policy.page_tokens
    return needed


def staged_tiers(policy: Policy, unified: bool) -> int:
    """Tiers whose pages pass through staging."""
    return int(policy.kv_cache.disk > 0) + int(policy.kv_cache.host > 0 and not unified)


def kv_working(shape: ModelShape, policy: Policy, staging: int, unified: bool) -> dict[Tier, int]:
    """What KV takes besides pages: staging of so many of them, new rows that leave, what packed
    pages need, and otherwise, for DISK, pages that are not full. Of those there is one for every
    sequence.
    """
    buffers = staged_tiers(policy, unified) * staging
    buffers *= max(shape.kv_bytes_per_token) * policy.page_tokens
    working = {Tier.DEVICE: 2 * buffers, Tier.HOST: 0 if unified else 4 * buffers}
    if shape.kv_packed:
        working[Tier.DEVICE] += packed_working(shape, policy, unified=unified)
    else:
        working[Tier.DEVICE] += leaving_rows_bytes(shape, policy, unified=unified)
    for tier, nbytes in _hosted_working(shape, policy, unified).items():
        working[tier] += nbytes
    if policy.kv_cache.disk and not shape.kv_packed:
        tails = policy.max_sequences * policy.page_tokens * shape.kv_token_bytes
        working[Tier.DEVICE if unified else Tier.HOST] += tails
    return working


def packed_working(shape: ModelShape, policy: Policy, *, unified: bool) -> int:
    """What packed pages need on DEVICE, also for those on other tiers; 0 where none is packed."""
    if not shape.kv_packed:
        return 0
    leaving = leaving_rows_bytes(shape, policy, unified=unified)
    return recent_pages_bytes(shape, policy) + packing_bytes(shape, policy) + leaving


def recent_pages_bytes(shape: ModelShape, policy: Policy) -> int:
    """Of every sequence's first page and its newest one, which is packed when it is full, and of a
    mean key and value.
    """
    if not shape.kv_packed:
        return 0
    return policy.max_sequences * (2 * policy.page_tokens + 1) * sum(shape.kv_rows)


def packing_bytes(shape: ModelShape, policy: Policy) -> int:
    """Of packing `PACKED_PAGES`: their values as they are gathered, then in float32, which takes up
    to twice as much, before and after they are turned, and their codes.
    """
    if not shape.kv_packed:
        return 0
    layers = zip(shape.kv_rows, shape.kv_bytes_per_token)
    token_bytes = max(5 * row + packed for row, packed in layers)
    return PACKED_PAGES * policy.page_tokens * token_bytes


def _hosted_working(shape: ModelShape, policy: Policy, unified: bool) -> dict[Tier, int]:
    rows = hosted_rows(policy, unified=unified)
    if not rows:
        return {Tier.DEVICE: 0, Tier.HOST: 0}
    row_bytes = hosted_row_bytes(shape)
    working = {tier: HOSTED_TURNS * rows * nbytes for tier, nbytes in row_bytes.items()}
    working[Tier.DEVICE] += broken_off_bytes(shape, policy)
    return working


def hosted_rows(policy: Policy, *, unified: bool) -> int:
    """Rows of a micro-batch that may attend to their pages on HOST; 0 where none does."""
    if unified or not policy.kv_cache.host or policy.attention == "device":
        return 0
    return min(policy.micro_batch_rows, policy.max_sequences)


def hosted_row_bytes(shape: ModelShape) -> dict[Tier, int]:
    """Bytes of one row's way to attention on HOST: query, key and value there, float32 back."""
    back = 4 * shape.output_values
    return {Tier.DEVICE: back, Tier.HOST: back + _sent_row_bytes(shape)}


def _sent_row_bytes(shape: ModelShape) -> int:
    """Of its query, key and value; where pages are packed, the last two stay on DEVICE."""
    new = 0 if shape.kv_packed else max(shape.kv_rows)
    return shape.query_values * shape.value_bytes + new


def broken_off_bytes(shape: ModelShape, policy: Policy) -> int:
    """On DEVICE while micro-batches wait inside attention: their rows' queries, keys and values,
    what they send to HOST, and results in float32, their own and what merging makes of them.
    """
    own = shape.query_values * shape.value_bytes + max(shape.kv_rows)
    results = 2 * 4 * shape.output_values
    return BROKEN_OFF * policy.micro_batch_rows * (own + _sent_row_bytes(shape) + results)


def leaving_rows_bytes(shape: ModelShape, policy: Policy, *, unified: bool) -> int:
    """New keys and values that are on DEVICE until they have arrived on HOST.

    Packed ones leave as whole pages, to HOST and DISK.
    """
    if shape.kv_packed:
        tokens = staged_tiers(policy, unified) * PACKED_PAGES * policy.page_tokens
    else:
        tokens = policy.micro_batch_rows if policy.kv_cache.host and not unified else 0
    return LEAVING_BATCHES * tokens * max(shape.kv_bytes_per_token)


def kv_file_bytes(shape: ModelShape, policy: Policy, pages: int) -> int:
    page_bytes = [nbytes * policy.page_tokens for nbytes in shape.kv_bytes_per_token]
    return kv_file_layout(page_bytes, pages)[1] if pages else 0


def kv_pages(
    shape: ModelShape, policy: Policy, room: Mapping[Tier, int], context_length: int
) -> dict[Tier, int]:
    """Pages per tier that follow the policy's split and fit into `room` (bytes left per tier).

    Raises `CapacityError` where a tier that is to hold KV has not the room for one page.
    """
    page_bytes = shape.kv_token_bytes * policy.page_tokens
    used = [tier for tier in Tier if policy.kv_cache.fraction(tier)]
    room = dict(room)
    if policy.kv_cache.disk:
        room[Tier.DISK] -= shape.num_layers * DISK_BLOCK  # each layer's pages start a block
    total = float(policy.max_sequences * -(-context_length // policy.page_tokens))
    for tier in used:
        total = min(total, room[tier] // page_bytes / policy.kv_cache.fraction(tier))
    pages = {tier: max(0, int(total * policy.kv_cache.fraction(tier))) for tier in Tier}
    for tier in used:
        # At least one, where rounding alone took it away.
        pages[tier] = max(pages[tier], min(1, room[tier] // page_bytes))
        if pages[tier] < 1:
            raise CapacityError(
                f"no room for the KV cache on {tier}: one page of {policy.page_tokens} tokens "
                f"needs {format_size(page_bytes)}, {format_size(max(0, room[tier]))} is left",
                hint=f"raise {BUDGET_FLAG[tier]}, move the KV cache (--kv-cache) or "
                f"weights (--weights) to another tier, or lower {batch_flags(shape)}",
            )
    return pages


def batch_flags(shape: ModelShape) -> str:
    """What to lower where working memory is short, in words."""
    if shape.kv_packed:  # two pages of every sequence are on DEVICE
        return "--micro-batch, --max-rows and --max-sequences"
    return "--micro-batch and --max-rows"


def swap_pages(
    shape: ModelShape,
    policy: Policy,
    pages: Mapping[Tier, int],
    free: Mapping[Tier, int],
    context_length: int,
    *,
    unified: bool,
) -> tuple[Tier | None, int]:
    """The tier that pages of sequences move to that have to wait, and how many of them it takes.

    There is one where all KV is on DEVICE and may not suffice, in what is left `free` besides.
    """
    most = policy.max_sequences * -(-context_length // policy.page_tokens)
    if policy.preemption == "recompute" or policy.kv_cache.device < 100:
        return None, 0
    if pages[Tier.DEVICE] >= most:
        return None, 0  # nobody ever has to wait
    tier = Tier.DISK if unified else Tier.HOST
    page_bytes = shape.kv_token_bytes * policy.page_tokens
    room = min(int(free[tier] * SWAP_OF_FREE), MOST_SWAP_BYTES)
    room -= shape.num_layers * DISK_BLOCK if tier is Tier.DISK else 0
    count = min(int(pages[Tier.DEVICE] * SWAP_OF_PAGES), room // page_bytes)
    return (tier, count) if count > 0 else (None, 0)


def embedding_rows(shape: ModelShape, policy: Policy, unified: bool) -> int:
    """HOST staging for a sweep's rows of an embedding table that may not be on the device."""
    away = not unified and policy.weights.device < 100
    rows = min(policy.max_rows, shape.vocab_size)
    return rows * shape.hidden_size * shape.value_bytes if away else 0
