"""The KV cache: one page pool per tier and layer, and the staging that HOST pages pass through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from offload.kv_layout import KVGroup, SpanPages, build_group
from offload.links import Link, PageSlots, TensorRows
from offload.paged_kv import PagedKV
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload.backend import DeviceBackend
    from offload.pages import PagePools
    from offload.transfer import Transfer
    from offload.transfer_engine import TransferEngine


class LayerShape(Protocol):
    """What one layer stores per token."""

    @property
    def kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...


class Span(Protocol):
    """Rows of one sequence in a micro-batch."""

    @property
    def sequence(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...


@dataclass(slots=True)
class _Staging:
    """Device copies of HOST pages for one micro-batch at a time."""

    device: torch.Tensor
    pinned_in: torch.Tensor
    pinned_out: torch.Tensor
    pools: dict[tuple[int, int, int], PagedKV] = field(default_factory=dict)
    """The device copies as pages of each shape of layer."""
    free: Any = None
    arrived: Transfer | None = None
    stored: Transfer | None = None
    kept: Transfer | None = None
    """The last copy that passed through `pinned_out`, which is free when its rows are scattered."""


class KVCache:
    """Keys and values of all sequences, and their way to where attention runs."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        dtype: torch.dtype,
        pools: PagePools,
        backend: DeviceBackend,
        transfers: TransferEngine,
        staging_pages: int,
        gathered_tokens: int = 16384,
    ) -> None:
        self._shapes = shapes
        self._dtype = dtype
        self._pools = pools
        self._backend = backend
        self._transfers = transfers
        self._gathered_tokens = gathered_tokens
        self._homes: list[tuple[Tier, torch.Tensor]] = []
        self._layers: dict[Tier, list[PagedKV]] = {}
        pools.on_change = self._charge_pages
        for tier, pages in pools.capacity.items():
            if pages:
                self._layers[tier] = [self._pool(tier, pages, shape) for shape in shapes]
        self._staging: list[_Staging] = []
        if pools.capacity.get(Tier.HOST) and not backend.unified:
            self._staging = [self._make_staging(staging_pages) for _ in range(2)]
        self._batches: list[list[KVGroup]] = []
        self._staged: dict[tuple[int, int], _Staging] = {}
        """By layer and micro-batch: the staging its HOST pages are in."""
        self._last_store: dict[int, list[Transfer]] = {}
        self._earlier_store: dict[int, list[Transfer]] = {}
        """By layer, before this sweep: within one, no sequence reads what another one stores."""

    def _page_elements(self, shape: LayerShape) -> int:
        return self._pools.page_tokens * shape.kv_heads * (shape.key_dim + shape.value_dim)

    def _allocate(self, tier: Tier, elements: int, what: str) -> torch.Tensor:
        home = self._backend.allocate(tier, elements * self._dtype.itemsize, what)
        self._homes.append((tier, home))
        # Slots that hold no token yet are read and weighted with zero: they must not hold NaN.
        return home.zero_().view(self._dtype)

    def erase(self, sequence: int) -> None:
        """Zero the pages of a sequence whose values may not be numbers, before others get them."""
        table = self._pools.tables.get(sequence)
        if table is None:
            return
        for stores in self._last_store.values():
            for store in stores:
                store.synchronize()  # or they would write the same values again
        for pool in self._layers[table.tier]:
            pool.raw[torch.tensor(table.pages, device=pool.raw.device)] = 0
        for staging in self._staging:
            staging.device.zero_()
            staging.free = self._backend.record()

    def _charge_pages(self, tier: Tier, pages: int) -> None:
        if tier not in self._backend.lazy:
            return  # the whole pool was charged
        nbytes = pages * sum(map(self._page_elements, self._shapes)) * self._dtype.itemsize
        if nbytes > 0:
            self._backend.account.charge(tier, nbytes, "the KV cache")
        else:
            self._backend.account.refund(tier, -nbytes)

    def _pool(self, tier: Tier, pages: int, shape: LayerShape) -> PagedKV:
        elements = pages * self._page_elements(shape)
        if tier in self._backend.lazy:
            data = self._backend.reserve(elements * self._dtype.itemsize).view(self._dtype)
        else:
            data = self._allocate(tier, elements, "the KV cache")
        return self._paged(data, shape)

    def _paged(self, data: torch.Tensor, shape: LayerShape) -> PagedKV:
        size = self._page_elements(shape)
        raw = data[: data.numel() // size * size].view(-1, size)
        split = self._pools.page_tokens * shape.kv_heads * shape.key_dim
        tokens = self._pools.page_tokens
        keys = raw[:, :split].unflatten(1, (shape.kv_heads, tokens, shape.key_dim))
        values = raw[:, split:].unflatten(1, (shape.kv_heads, tokens, shape.value_dim))
        return PagedKV(keys, values, raw)

    def _staged_pool(self, staging: _Staging, layer: int) -> PagedKV:
        shape = self._shapes[layer]
        sizes = (shape.kv_heads, shape.key_dim, shape.value_dim)
        if sizes not in staging.pools:
            staging.pools[sizes] = self._paged(staging.device, shape)
        return staging.pools[sizes]

    def _make_staging(self, pages: int) -> _Staging:
        elements = pages * max(self._page_elements(shape) for shape in self._shapes)
        what = "staging for KV pages"
        return _Staging(
            self._allocate(Tier.DEVICE, elements, what),
            self._allocate(Tier.HOST, elements, what),
            self._allocate(Tier.HOST, elements, what),
        )

    def begin(self, micro_batches: Sequence[Sequence[Span]]) -> None:
        """Prepare the index tensors of a sweep's micro-batches (each a sequence of spans)."""
        self._batches = []
        self._earlier_store = dict(self._last_store)
        for spans in micro_batches:
            by_tier: dict[Tier, list[SpanPages]] = {}
            row = 0
            for span in spans:
                table = self._pools.tables[span.sequence]
                place = SpanPages(row, span.start, span.start + span.length, table.pages)
                by_tier.setdefault(table.tier, []).append(place)
                row += span.length
            groups = []
            for tier, places in by_tier.items():
                staged = tier is Tier.HOST and not self._backend.unified
                tokens, device = self._pools.page_tokens, self._backend.device
                groups.append(
                    build_group(
                        places,
                        tokens,
                        device,
                        tier,
                        staged=staged,
                        gathered_tokens=self._gathered_tokens,
                    )
                )
            self._batches.append(groups)

    def fetch(self, layer: int, number: int) -> Transfer | None:
        """Send the HOST pages of a micro-batch's layer to the device's staging."""
        group = next((g for g in self._batches[number] if g.staged), None)
        if group is None:
            return None
        staging = self._staging[(layer * len(self._batches) + number) % 2]
        self._staged[layer, number] = staging
        staging.arrived = None
        assert group.fetched is not None
        if len(group.fetched):
            home = self._layers[Tier.HOST][layer]
            target = self._staged_pool(staging, layer).raw[: len(group.fetched)]
            staging.arrived = self._transfers.submit(
                Link.HOST_TO_DEVICE,
                TensorRows(home.raw, group.fetched, staging.pinned_in),
                target,
                kind="kv",
                after=[staging.free, *self._earlier_store.get(layer, ())],
                priority=0,
            )
        return staging.arrived

    def arriving(self, layer: int, number: int) -> Transfer | None:
        """What `append` will wait for: the HOST pages of a micro-batch."""
        staging = self._staged.get((layer, number))
        return None if staging is None else staging.arrived

    def append(self, layer: int, number: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write new `key` [kv_heads, rows, key_dim] and `value` into the pages attention reads."""
        staging = self._staged.get((layer, number))
        if (arriving := self.arriving(layer, number)) is not None:
            arriving.wait()
        for group, pool in self.view(layer, number):
            # [rows, kv_heads, dim]; a group of all rows needs no gather
            if group.fetched is not None:
                # Fresh pages are read whole, with weight zero where no token is: no old NaN there.
                pool.raw[len(group.fetched) : group.num_staged].zero_()
            keys, values = key.transpose(0, 1), value.transpose(0, 1)
            if len(group.rows) != keys.shape[0]:
                keys, values = keys[group.rows], values[group.rows]
            pool.store(group.pages, group.offsets, keys, values, group.slots)
            if group.staged:
                assert staging is not None
                self._keep(
                    layer, staging, group, torch.cat([keys.flatten(1), values.flatten(1)], 1)
                )

    def view(self, layer: int, number: int) -> list[tuple[KVGroup, PagedKV]]:
        """The rows of a micro-batch by pool, with the pool of `layer`."""
        result = []
        for group in self._batches[number]:
            if group.staged:
                pool = self._staged_pool(self._staged[layer, number], layer)
            else:
                pool = self._layers[group.tier][layer]
            result.append((group, pool))
        return result

    def _keep(self, layer: int, staging: _Staging, group: KVGroup, rows: torch.Tensor) -> None:
        assert group.home_pages is not None
        assert group.home_offsets is not None
        home = self._layers[Tier.HOST][layer]
        slots = PageSlots(
            home.keys, home.values, group.home_pages, group.home_offsets, staging.pinned_out
        )
        staging.stored = staging.kept = self._transfers.submit(
            Link.DEVICE_TO_HOST,
            rows,
            slots,
            kind="kv",
            after=[self._backend.record(), staging.kept],
        )

    def store(self, layer: int, number: int) -> Transfer | None:
        """The layer has run: its staging may be reused, its new rows are on their way to HOST."""
        staging = self._staged.pop((layer, number), None)
        if staging is None:
            return None
        staging.free = self._backend.record()
        stored, staging.stored = staging.stored, None
        if stored is not None:
            earlier = self._last_store.get(layer, [])
            for transfer in earlier:
                if transfer.issued:
                    transfer.wait()  # raises what the copy raised
            self._last_store[layer] = [*(t for t in earlier if not t.issued), stored]
        return stored

    def close(self) -> None:
        """Give all memory back, also the pages of sequences that were broken off."""
        for sequence in list(self._pools.tables):
            self._pools.release(sequence)
        for tier, home in self._homes:
            self._backend.free(tier, home)
        self._homes.clear()
        self._layers.clear()
        self._staging.clear()
        self._batches.clear()
