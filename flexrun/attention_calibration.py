"""How fast a machine attends: the processor to pages on HOST, the device to its own."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from flexrun.attention.torch_ops import TorchAttention
from flexrun.attention.triton_attention import TritonAttention, usable
from flexrun.attention_speed import MEASURED_BYTES, attention_call, measured_speed
from flexrun.compute_calibration import Products
from flexrun.measuring import Room, median_seconds
from flexrun.model_trace import AttentionShape
from flexrun.paused_forward import AttentionOptions
from offload.kv_layout import build_group
from offload.kv_moves import SpanPages
from offload.links import HostWork, Link
from offload.paged_kv import KVFormat, PagedKV
from offload.tiers import Tier
from offload.transfer import URGENT
from offload.transfer_engine import TransferEngine
from policy_search.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flexrun.attention.interface import AttentionBackend
    from offload.backend import DeviceBackend
    from offload.kv_layout import KVGroup

SHAPE = AttentionShape(query_heads=32, kv_heads=8, key_dim=128, value_dim=128)
"""Of Llama 3 8B's layers, and of many like it."""
PAGE_TOKENS = Policy().page_tokens
_SEQUENCES = {"cpu": 16, "cuda": 64}
_CHUNK = {"cpu": 512, "cuda": 2048}
"""Rows of a prompt, which has as many positions before them."""
_BESIDE_ROWS = 64
"""Of products while the processor attends."""
_QUERY_BYTES = 1 << 16
_CALL_SECONDS = 0.2


def page_bytes(dtype: torch.dtype) -> int:
    """Of one page of one layer."""
    return KVFormat(dtype).page_bytes(SHAPE, PAGE_TOKENS)


def measured_host_attention(
    backend: DeviceBackend, dtype: torch.dtype, seconds: float
) -> dict[str, float]:
    """Bytes per second of pages on HOST, what attention and compute take from each other, and the
    seconds of rows on their way there and back.

    The second only where the device is emulated: then both are work of the same cores.
    """
    from flexrun.attention.cpu import CpuAttention  # Numba takes a while to import

    emulated = backend.device.type == "cpu"
    threads = max(1, torch.get_num_threads() // (2 if emulated else 1))
    with Products(backend, dtype) as products:
        pages = _page_count(products, Tier.HOST, dtype)
        if not pages:
            return {"host_attention": math.inf, "contention": 0.0, "hosted_call": 0.0}
        pool = _pool(products, Tier.HOST, pages, dtype)
        both = emulated and products.prepare()
        compute = products.product(_BESIDE_ROWS) if both else None
        with contextlib.closing(CpuAttention(threads)) as attention:
            attention.compile(pool.format)
            speed = measured_speed(attention, pool, SHAPE, compute, seconds / 3)
            _, attend = attention_call(attention, _pool(products, Tier.HOST, 1, dtype), SHAPE)
            call = _hosted_call(products, attend)
    return {
        "host_attention": speed.bytes_per_second,
        "contention": min(speed.contention, 0.99),
        "hosted_call": call,
    }


def _hosted_call(room: Room, attend: Callable[[], object]) -> float:
    """Seconds until rows are back whose attention on HOST is to next to nothing; 0 without room."""
    backend = room.backend
    if min(room.left(Tier.DEVICE), room.left(Tier.HOST)) < _QUERY_BYTES:
        return 0.0
    here, there = (room.take(tier, _QUERY_BYTES) for tier in (Tier.DEVICE, Tier.HOST))
    transfers = TransferEngine(backend)

    def work() -> None:
        attend()

    def call() -> None:
        computed = backend.record()
        down = transfers.submit(
            Link.DEVICE_TO_HOST, here, there, kind="queries", after=[computed], priority=URGENT
        )
        attended = transfers.submit_work(
            Link.HOST_ATTENTION, HostWork(work, 0), kind="kv", after=[down]
        )
        back = transfers.submit(
            Link.HOST_TO_DEVICE, there, here, kind="attention", after=[attended], priority=URGENT
        )
        back.synchronize()

    try:
        return median_seconds(backend, call, _CALL_SECONDS)
    finally:
        transfers.close()


def _page_count(room: Room, tier: Tier, dtype: torch.dtype) -> int:
    """That fit into a quarter of the budget: attention needs memory of its own."""
    return min(MEASURED_BYTES, room.left(tier) // 4) // page_bytes(dtype)


def _pool(room: Room, tier: Tier, pages: int, dtype: torch.dtype) -> PagedKV:
    memory = room.numbers(room.take_pages(tier, pages * page_bytes(dtype)), dtype)
    return PagedKV.of(memory, SHAPE, PAGE_TOKENS)


@contextlib.contextmanager
def device_attention(
    backend: DeviceBackend, dtype: torch.dtype, shapes: Sequence[AttentionShape] = (SHAPE,)
) -> Iterator[AttentionBackend]:
    """What the engine attends with on this device, compiled for layers of `shapes`."""
    if backend.device.type != "cpu":
        where = set(shapes), dtype, PAGE_TOKENS, backend.device
        yield TritonAttention() if usable(*where) else TorchAttention()
        return
    from flexrun.attention.cpu import CpuAttention

    with contextlib.closing(CpuAttention()) as attention:
        attention.compile(KVFormat(dtype))
        yield attention


def measured_decoding(
    backend: DeviceBackend, dtype: torch.dtype, seconds: float
) -> dict[str, float]:
    """Bytes per second of pages on the device, a row for each sequence."""
    with Room(backend) as room:
        pages = _page_count(room, Tier.DEVICE, dtype)
        if not pages:
            return {"device_attention": math.inf}
        pool, count = _pool(room, Tier.DEVICE, pages, dtype), _SEQUENCES[backend.device.type]
        # Each sequence's pages lie apart, as they do in a job.
        numbers = [range(pages)[row::count] for row in range(min(count, pages))]
        spans = [_span(row, mine, 1) for row, mine in enumerate(numbers)]
        return {"device_attention": pool.raw.nbytes / _seconds(backend, pool, spans, seconds)}


def measured_chunk(backend: DeviceBackend, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Operations per second of a prompt's rows.

    For a row and a position 4 of them for each value of a query: see `ModelShape.attention_flops`.
    """
    with Room(backend) as room:
        wanted = 2 * _CHUNK[backend.device.type] // PAGE_TOKENS
        pages = min(wanted, _page_count(room, Tier.DEVICE, dtype)) // 2 * 2
        if not pages:
            return {"attention_flops": math.inf}
        pool, rows = _pool(room, Tier.DEVICE, pages, dtype), pages * PAGE_TOKENS // 2
        taken = _seconds(backend, pool, [_span(0, range(pages), rows)], seconds)
        positions = sum(range(rows + 1, 2 * rows + 1))  # each row sees itself, too
        flops = 4 * SHAPE.query_heads * SHAPE.key_dim * positions
        return {"attention_flops": flops / taken}


def _span(row: int, pages: Sequence[int], count: int) -> SpanPages:
    """The last `count` rows of a sequence that fills its pages, from `row` of the micro-batch."""
    end = len(pages) * PAGE_TOKENS
    return SpanPages(row, end - count, end, pages, range(len(pages)))


def _seconds(
    backend: DeviceBackend, pool: PagedKV, spans: Sequence[SpanPages], seconds: float
) -> float:
    """Of all rows of `spans`, over all their pages."""
    device, dtype = backend.device, pool.format.dtype
    group = build_group(spans, PAGE_TOKENS, device, Tier.DEVICE, staged=False)
    rows = sum(span.count for span in spans)
    query = torch.randn(SHAPE.query_heads, rows, SHAPE.key_dim, device=device).to(dtype)
    key, value = (
        torch.randn(SHAPE.kv_heads, rows, dim, device=device).to(dtype)
        for dim in (SHAPE.key_dim, SHAPE.value_dim)
    )
    options = AttentionOptions(scaling=SHAPE.key_dim**-0.5)
    with device_attention(backend, dtype) as attention:
        attend = partial(_attend, attention, (query, key, value), group, pool, options)
        return median_seconds(backend, attend, seconds)


def _attend(
    attention: AttentionBackend,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    group: KVGroup,
    pool: PagedKV,
    options: AttentionOptions,
) -> None:
    attention.prepare([group])  # nothing, but for the first time
    attention.parts(*rows, [(group, pool)], options)
