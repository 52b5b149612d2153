"""Attention to pages on HOST by the processor, while the device computes other micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch

from compression.rotation import rotated
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


MOST_VIEWS = 64
"""That a turn keeps: micro-batches have other row counts as sequences come and go."""
_Shapes: TypeAlias = tuple[tuple[int, int, int], ...]
"""Of queries, keys and values: rows, heads, values of a head."""


@dataclass(frozen=True, slots=True)
class _Views:
    """What rows of some shapes take of a turn's memory. Made once: operations are slow here."""

    there: torch.Tensor
    sides: list[torch.Tensor]
    """Its queries and, if they are stored on HOST, new keys and values [rows, heads, dim]."""
    new: torch.Tensor | None
    """These as `PagedKV.pack` would have them, if they are of one size."""
    result: torch.Tensor
    into: tuple[torch.Tensor, torch.Tensor]
    """Its outputs and log-sum-exps."""
    back: torch.Tensor
    out: torch.Tensor
    """Its outputs [rows, heads, dim] …"""
    lse: torch.Tensor
    """… and log-sum-exps [rows, heads]."""


@dataclass(slots=True)
class _Turn:
    """Memory of one micro-batch whose rows are on their way."""

    there: torch.Tensor
    """Pinned uint8: queries, and new keys and values, as they arrive."""
    result: torch.Tensor
    """Pinned float32: outputs, then log-sum-exps."""
    back: torch.Tensor
    """The same on the device."""
    work: Transfer | None = None
    """What reads `there` and fills `result`."""
    returned: Transfer | None = None
    """What reads `result` and fills `back`."""
    views: dict[tuple[_Shapes, int, torch.dtype], _Views] = field(default_factory=dict)

    def of(self, shapes: _Shapes, dim: int, dtype: torch.dtype) -> _Views:
        """The memory for rows of these shapes and type, whose results have `dim` values a head."""
        found = self.views.get((shapes, dim, dtype))
        if found is None:
            if len(self.views) >= MOST_VIEWS:
                self.views.clear()
            found = self.views[shapes, dim, dtype] = self._views(shapes, dim, dtype)
        return found

    def _views(self, shapes: _Shapes, dim: int, dtype: torch.dtype) -> _Views:
        sizes = [math.prod(shape) for shape in shapes]
        there = self.there[: sum(sizes) * dtype.itemsize].view(dtype)
        sides = [side.view(shape) for side, shape in zip(there.split(sizes), shapes)]
        rows, heads, _ = shapes[0]
        alike = len(shapes) == 3 and shapes[1] == shapes[2]
        split, length = rows * heads * dim, rows * heads * (dim + 1)
        result, back = self.result[:length], self.back[:length]
        return _Views(
            there=there,
            sides=sides,
            new=there[sizes[0] :].view(-1, dim) if alike else None,
            result=result,
            into=(result[:split], result[split:]),
            back=back,
            out=back[:split].view(rows, heads, dim),
            lse=back[split:].view(rows, heads),
        )


@dataclass(frozen=True, slots=True)
class Pending:
    """Rows that HOST attends to."""

    rows: Rows
    views: _Views
    returned: Transfer
    turned: bool
    """What comes back has to be turned: see `KVFormat.rotated`."""


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
        pool = self._kv.pool(Tier.HOST, layer)
        # Only full pages are packed: what is new does not go there yet.
        sides = (query,) if pool.format.rotated else (query, key, value)
        sent, shapes = _in_one_piece(hosted.rows, *sides)
        if pool.format.rotated:
            sent = rotated(sent.view(shapes[0])).view(-1)
        views = turn.of(shapes, pool.value_dim, sent.dtype)
        # Also the end of all that computed with what came back when it was this turn before.
        computed = self._backend.record()
        down = self._transfers.submit(
            Link.DEVICE_TO_HOST,
            sent,
            views.there,
            kind="queries",
            # If a sweep broke off, nobody has waited for the last work of the turn.
            after=[computed, _unless_failed(turn.work)],
            priority=URGENT,
        )
        work = partial(self._attend, hosted.group, pool, options, views)
        turn.work = self._transfers.submit_work(
            Link.HOST_ATTENTION,
            HostWork(work, hosted.pages * pool.page_bytes),
            kind="kv",
            after=[down, _unless_failed(turn.returned), *self._kv.earlier_stores(layer)],
        )
        self._kv.add_store(layer, number, turn.work)
        turn.returned = self._transfers.submit(
            Link.HOST_TO_DEVICE,
            views.result,
            views.back,
            kind="attention",
            after=[turn.work, computed],
            priority=URGENT,
        )
        everything = len(hosted.rows) == query.shape[1]
        rows = slice(None) if everything else hosted.rows
        return Pending(rows, views, turn.returned, pool.format.rotated)

    def _attend(
        self,
        group: KVGroup,
        pool: PagedKV,
        options: AttentionOptions,
        views: _Views,
    ) -> None:
        """On the processor: store what is new, then attend.

        As few operations as can be: with each, Python's lock goes to the thread that drives the
        device and has to be waited for.
        """
        query, *new = views.sides
        if len(group.rows) == len(query) and views.new is not None:
            pool.store(group.slots, views.new)
        elif len(group.rows):
            pool.store(group.slots, pool.pack(*(side[group.rows] for side in new)))
        spans = group.paged()
        assert spans is not None
        self._attention.attend(query, spans, pool, options, views.into)

    def measure(
        self, shape: AttentionShape, compute: Callable[[], object] | None = None
    ) -> AttentionSpeed:
        """Of layers of `shape`; `compute`: see `measured_speed`."""
        pool, account = self._kv.pool(Tier.HOST, 0), self._backend.account
        if Tier.HOST not in self._backend.lazy:
            return measured_speed(self._attention, pool, shape, compute)
        # Reading what was never written tells nothing. The same kind of memory is written for it.
        room = account.available(Tier.HOST)
        nbytes = MEASURED_BYTES if room is None else min(MEASURED_BYTES, room // 2)
        nbytes = max(1, nbytes // pool.page_bytes) * pool.page_bytes
        account.charge(Tier.HOST, nbytes, "a test of attention")
        try:
            written = self._backend.reserve(nbytes).fill_(1).view(pool.raw.dtype)
            pool = PagedKV.of(written, shape, pool.page_tokens, pool.format)
            return measured_speed(self._attention, pool, shape, compute)
        finally:
            account.refund(Tier.HOST, nbytes)

    def waits_for(self, pending: Pending) -> list[Transfer]:
        """What has to arrive before `receive`."""
        return [pending.returned]

    def receive(self, pending: Pending) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        """Rows, output [n, H, V] and log-sum-exp [n, H] (float32), on the device.

        They are the turn's memory: to be computed with before `send` is called for its next one.
        """
        out = pending.views.out
        return pending.rows, rotated(out) if pending.turned else out, pending.views.lse

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


def _in_one_piece(rows: torch.Tensor, *sides: torch.Tensor) -> tuple[torch.Tensor, _Shapes]:
    """`rows` [n], in order, of each of `sides` [heads, all rows, dim]: flat, one after another.

    Also the shapes [n, heads, dim] of its pieces.
    """
    shapes = tuple((len(rows), side.shape[0], side.shape[2]) for side in sides)
    by_row = [side.transpose(0, 1) for side in sides]
    chosen = [side if len(rows) == len(side) else side[rows] for side in by_row]
    return torch.cat([side.reshape(-1) for side in chosen]), shapes
