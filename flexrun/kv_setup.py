"""The KV cache under its budgets, and the scheduler that deals its pages out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from flexrun.schedulers import make_scheduler
from offload.kv_cache import KVCache
from offload.pages import PagePools
from offload.tiers import Tier
from policy_search.kv_memory import (
    kv_pages,
    kv_room,
    leaving_rows_bytes,
    packing_bytes,
    swap_pages,
)

if TYPE_CHECKING:
    import contextlib
    from pathlib import Path

    import torch

    from flexrun.model import Model
    from flexrun.scheduler import BatchScheduler
    from offload.backend import DeviceBackend
    from offload.transfer_engine import TransferEngine
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy


class KVSetup(NamedTuple):
    """What belongs together: page numbers, pages, and who gets them."""

    pools: PagePools
    cache: KVCache
    scheduler: BatchScheduler


def open_kv(
    model: Model,
    dtype: torch.dtype,
    shape: ModelShape,
    policy: Policy,
    backend: DeviceBackend,
    transfers: TransferEngine,
    directory: Path,
    closing: contextlib.ExitStack,
) -> KVSetup:
    """Take what the policy says of the memory that is left. Raises `CapacityError`."""
    context, unified = model.context_length, backend.unified
    free = {tier: backend.account.available(tier) or 0 for tier in Tier}
    room, staging = kv_room(shape, policy, free, context, unified=unified, lazy=backend.lazy)
    pages = kv_pages(shape, policy, room, context)
    for nbytes, what in (
        (leaving_rows_bytes(shape, policy, unified=unified), "new keys and values that leave"),
        (packing_bytes(shape, policy), "KV pages while they are packed"),
    ):
        backend.account.charge(Tier.DEVICE, nbytes, what)
        closing.callback(backend.account.refund, Tier.DEVICE, nbytes)
    away = (Tier.DISK,) if unified else (Tier.HOST, Tier.DISK)
    limits = {tier: staging for tier in away if pages[tier]}
    groups = policy.quantization.kv_groups(str(dtype).removeprefix("torch."))
    tails = policy.max_sequences if pages[Tier.DISK] or groups is not None else 0
    swap, count = swap_pages(shape, policy, pages, room, context, unified=unified)
    if swap is not None:
        pages[swap] = count
    pools = PagePools(
        pages, policy.page_tokens, limits, tails, keeps_recent=groups is not None, swap=swap
    )
    cache = KVCache(
        model.attention,
        dtype,
        pools,
        backend,
        transfers,
        staging,
        policy.gathered_tokens,
        directory,
        groups,
        # A soft cap of scores does not commute with a shift of them.
        centred=getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is None,
    )
    closing.callback(cache.close)
    scheduler = make_scheduler(policy, pools)
    scheduler.promoted_from = away[::-1]
    scheduler.speculation.most_logits = policy.logit_rows
    return KVSetup(pools, cache, scheduler)
