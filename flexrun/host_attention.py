"""Attention to pages on HOST by the processor, while the device computes other micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from flexrun.attention_speed import MEASURED_BYTES, measured_speed
from offload.links import HostWork, Link
from offload.paged_kv import PagedKV
from offload.tiers import HOSTED_TURNS, Tier
from offload.transfer import URGENT

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexrun.attention.cpu import CpuAttention
    from flexrun.attention.state import Rows
    from flexrun.attention_speed import AttentionSpeed
    from flexrun.model_trace import AttentionShape
    from flexrun.paused_forward import AttentionOptions
    from offload.backend import DeviceBackend
    from offload.kv_cache import KVCache
    from offload.kv_layout import KVGroup
    from offload.transfer import Transfer
    from offload.transfer_engine import TransferEngine


@dataclass(slots=True)
class _Turn:
    """Memory of one micro-batch whose rows are on their way."""

    there: torch.Tensor
    """Pinned uint8: queries and new keys and values, as they arrive."""
    result: torch.Tensor
    """Pinned float32: outputs, then log-sum-exps."""
    back: torch.Tensor
    """The same on the device."""
    work: Transfer | None = None
    """What reads `there` and fills `result`."""
    returned: Transfer | None = None
    """What reads `result` and fills `back`."""
    free: Any = None
    """Event after which `back` may be overwritten."""


@dataclass(frozen=True, slots=True)
class Pending:
    """Rows that HOST attends to."""

    rows: Rows
    turn: _Turn
    shape: tuple[int, int, int]
    """Rows, heads, values of a head."""


class HostAttention:
    """Queries go down, outputs and log-sum-exps come back; keys and values stay where they are."""

    def __init__(
        self,
        attention: CpuAttention,
        kv_cache: KVCache,
        backend: DeviceBackend,
        transfers: TransferEngine,
        most_rows: int,
        row_bytes: dict[Tier, int],
        broken_off_bytes: int,
    ) -> None:
        """For micro-batches of `most_rows` rows that are hosted; `row_bytes` of memory for each.

        What layers that have broken off hold on the device is charged here, too.
        """
        self._attention = attention
        self._kv = kv_cache
        self._backend = backend
        self._transfers = transfers
        self._turns: list[_Turn] = []
        self._number = 0
        self._homes: list[tuple[Tier, torch.Tensor]] = []
        what = "layers that wait for attention on HOST"
        backend.account.charge(Tier.DEVICE, broken_off_bytes, what)
        self._charged = broken_off_bytes
        back = most_rows * row_bytes[Tier.DEVICE]
        there = most_rows * row_bytes[Tier.HOST] - back
        try:
            for _ in range(HOSTED_TURNS):
                self._turns.append(
                    _Turn(
                        self._allocate(Tier.HOST, there),
                        self._allocate(Tier.HOST, back).view(torch.float32),
                        self._allocate(Tier.DEVICE, back).view(torch.float32),
                    )
                )
        except BaseException:
            self.close()
            raise

    def _allocate(self, tier: Tier, nbytes: int) -> torch.Tensor:
        home = self._backend.allocate(tier, nbytes, "queries for attention on HOST")
        self._homes.append((tier, home))
        return home

    def send(
        self,
        layer: int,
        number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> Pending | None:
        """Send the hosted rows of a micro-batch, if it has any, on their way through one layer.

        query [query_heads, rows, key_dim], key and value [kv_heads, rows, ...] are all its rows.
        """
        hosted = self._kv.hosted(number)
        if hosted is None:
            return None
        turn = self._turns[self._number % HOSTED_TURNS]
        self._number += 1
        sent, shapes = _in_one_piece(hosted.rows, query, key, value)
        there = turn.there[: sent.nbytes].view(sent.dtype)
        shape = shapes[0][0], shapes[0][1], shapes[2][2]
        length = shape[0] * shape[1] * (shape[2] + 1)
        result = turn.result[:length]
        down = self._transfers.submit(
            Link.DEVICE_TO_HOST,
            sent,
            there,
            kind="queries",
            # If a sweep broke off, nobody has waited for the last work of the turn.
            after=[self._backend.record(), _unless_failed(turn.work)],
            priority=URGENT,
        )
        pool = self._kv.host_pool(layer)
        work = partial(self._attend, hosted.group, pool, options, there, shapes, result)
        turn.work = self._transfers.submit_work(
            Link.HOST_ATTENTION,
            HostWork(work, hosted.pages * pool.raw[0].nbytes),
            kind="kv",
            after=[down, _unless_failed(turn.returned), *self._kv.earlier_stores(layer)],
        )
        self._kv.add_store(layer, number, turn.work)
        turn.returned = self._transfers.submit(
            Link.HOST_TO_DEVICE,
            result,
            turn.back[:length],
            kind="attention",
            after=[turn.work, turn.free],
            priority=URGENT,
        )
        everything = shape[0] == query.shape[1]
        return Pending(slice(None) if everything else hosted.rows, turn, shape)

    def _attend(
        self,
        group: KVGroup,
        pool: PagedKV,
        options: AttentionOptions,
        there: torch.Tensor,
        shapes: list[tuple[int, int, int]],
        result: torch.Tensor,
    ) -> None:
        """On the processor: store what is new, then attend.

        As few operations as can be: with each, Python's lock goes to the thread that drives the
        device and has to be waited for.
        """
        query, key, value = _pieces(there, shapes)
        if len(group.rows) == len(key) and pool.alike:
            pool.store(group.slots, there[query.numel() :])  # as `pack` would have it
        elif len(group.rows):
            pool.store(group.slots, pool.pack(key[group.rows], value[group.rows]))
        spans = group.paged()
        assert spans is not None
        split = math.prod(shapes[0][:2]) * shapes[2][2]
        into = result[:split], result[split:]
        self._attention.attend(query.transpose(0, 1), spans, pool, options, into)

    def measure(
        self, shape: AttentionShape, compute: Callable[[], object] | None = None
    ) -> AttentionSpeed:
        """Of layers of `shape`; `compute`: see `measured_speed`."""
        pool, home = self._kv.host_pool(0), None
        if Tier.HOST in self._backend.lazy:  # reading what was never written tells nothing
            room = self._backend.account.available(Tier.HOST)
            nbytes = MEASURED_BYTES if room is None else min(MEASURED_BYTES, room // 2)
            home = self._backend.allocate(Tier.HOST, max(nbytes, pool.raw[0].nbytes), "a test")
            page_tokens = pool.keys.shape[2]
            pool = PagedKV.of(home.fill_(1).view(pool.raw.dtype), shape, page_tokens)
        try:
            return measured_speed(self._attention, pool, shape, compute)
        finally:
            if home is not None:
                self._backend.free(Tier.HOST, home)

    def waits_for(self, pending: Pending) -> list[Transfer]:
        """What has to arrive before `receive`."""
        assert pending.turn.returned is not None
        return [pending.turn.returned]

    def receive(self, pending: Pending) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        """Rows, output [n, H, V] and log-sum-exp [n, H] (float32), on the device."""
        rows, heads, dim = pending.shape
        turn = pending.turn
        back = turn.back[: rows * heads * (dim + 1)].clone()  # another micro-batch takes the memory
        turn.free = self._backend.record()
        split = rows * heads * dim
        return pending.rows, back[:split].view(rows, heads, dim), back[split:].view(rows, heads)

    def close(self) -> None:
        """Give memory and threads back."""
        self._turns.clear()
        for tier, home in self._homes:
            self._backend.free(tier, home)
        self._homes.clear()
        self._backend.account.refund(Tier.DEVICE, self._charged)
        self._charged = 0
        self._attention.close()


def _unless_failed(transfer: Transfer | None) -> Transfer | None:
    return None if transfer is None or transfer.error is not None else transfer


def _in_one_piece(
    rows: torch.Tensor, *sides: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """`rows` [n], in order, of each of `sides` [heads, all rows, dim]: flat, one after another.

    Also the shapes [n, heads, dim] that `_pieces` makes of them again.
    """
    chosen = [side if len(rows) == side.shape[1] else side[:, rows] for side in sides]
    shapes = [(len(rows), side.shape[0], side.shape[2]) for side in sides]
    sent = sides[0].new_empty(sum(side.numel() for side in chosen))
    for piece, side in zip(_pieces(sent, shapes), chosen):
        piece.copy_(side.transpose(0, 1))
    return sent, shapes


def _pieces(flat: torch.Tensor, shapes: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    ends = accumulate(math.prod(shape) for shape in shapes)
    return [flat[end - math.prod(shape) : end].view(shape) for shape, end in zip(shapes, ends)]
