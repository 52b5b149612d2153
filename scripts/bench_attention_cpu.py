"""Attention over paged keys and values on the CPU: how fast pages are read, and against torch.

Decode: 64 sequences of 500 to 1 500 tokens, one new row each; bytes of keys and values per second
against the rate at which this memory can be read, measured in the same run, and against torch's
`scaled_dot_product_attention` on the same values without pages; and against pages of the same
sequences in groups of four bits. Prefill: one prompt of 2 048 tokens against the same function. The
last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from compression.groupwise import quantize_minmax
from compression.spec import GroupFormat
from flexrun.attention.cpu import CpuAttention
from flexrun.attention.interface import AttentionBackend
from flexrun.paused_forward import AttentionOptions
from flexrun.plan import RowSpan
from offload.backend_cpu import CpuBackend
from offload.kv_cache import KVCache
from offload.kv_layout import PagedSpans, build_group
from offload.kv_moves import SpanPages
from offload.paged_kv import KVFormat, PagedKV
from offload.pages import PagePools
from offload.tiers import MemoryAccount, Tier
from offload.transfer_engine import TransferEngine

HEADS = {"9/3x64": (9, 3, 64), "32/8x128": (32, 8, 128)}
TARGETS = {"9/3x64": 0.5, "32/8x128": 0.35}
PACKED_TARGET = 1.8
"""Tokens per second over those of bfloat16 pages, which are 3.6 times as large."""
SEQUENCES = 64
PROMPT = 2048


class Shape:
    """What the one layer stores per token."""

    def __init__(self, kv_heads: int, dim: int) -> None:
        self.kv_heads, self.key_dim, self.value_dim = kv_heads, dim, dim


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def read_rate(threads: int) -> float:
    """Bytes per second at which the cores read memory: a sum over 512 MiB, median of several."""
    data = torch.ones(2**26, dtype=torch.int64)
    torch.set_num_threads(threads)
    return data.nbytes / median_seconds(data.sum, 9)


class Pages:
    """Sequences in a paged cache, and one micro-batch of them."""

    def __init__(self, heads: tuple[int, int, int], page_tokens: int, spans: list[RowSpan]) -> None:
        query_heads, kv_heads, dim = heads
        self.backend = CpuBackend(MemoryAccount())
        self.transfers = TransferEngine(self.backend)
        pages = sum(-(-span.end // page_tokens) for span in spans)
        pools = PagePools({Tier.DEVICE: pages}, page_tokens)
        shape = Shape(kv_heads, dim)
        self.cache = KVCache([shape], torch.bfloat16, pools, self.backend, self.transfers, 1)
        for span in spans:
            assert pools.allocate(span.sequence, span.end)
        self.rows = sum(span.length for span in spans)
        self.query = torch.randn(query_heads, self.rows, dim).bfloat16()
        before = [RowSpan(s.sequence, 0, s.start, False) for s in spans if s.start]
        if before:
            self.append(before, kv_heads, dim)
        self.key, self.value = self.append(spans, kv_heads, dim)
        self.groups = self.cache.view(0, 0)
        self.options = AttentionOptions(scaling=dim**-0.5)

    def append(
        self, spans: list[RowSpan], kv_heads: int, dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = sum(span.length for span in spans)
        key, value = (torch.randn(kv_heads, rows, dim).bfloat16() for _ in range(2))
        self.cache.begin([spans])
        self.cache.append(0, 0, key, value)
        return key, value

    def attend(self, backend: AttentionBackend) -> torch.Tensor:
        state = backend.parts(self.query, self.key, self.value, self.groups, self.options)
        return state.finish(None, self.query.dtype)

    def close(self) -> None:
        self.transfers.close()
        self.cache.close()
        self.backend.close()


def decode(name: str, page_tokens: int, repeats: int) -> dict[str, Any]:
    query_heads, kv_heads, dim = HEADS[name]
    lengths = lengths_of_sequences()
    spans = [RowSpan(number, length - 1, 1, True) for number, length in enumerate(lengths)]
    pages = Pages(HEADS[name], page_tokens, spans)
    nbytes = sum(lengths) * 2 * kv_heads * dim * 2
    result: dict[str, Any] = {"heads": name, "page_tokens": page_tokens}
    most = torch.get_num_threads()
    for threads in sorted({1, most}):
        read = read_rate(threads)
        backend = CpuAttention(threads)
        seconds = median_seconds(lambda b=backend: pages.attend(b), repeats)  # type: ignore[misc]
        backend.close()
        result[f"gb_per_s_{threads}"] = nbytes / seconds / 1e9
        result[f"read_gb_per_s_{threads}"] = read / 1e9
        result[f"share_{threads}"] = nbytes / seconds / read
    torch.set_num_threads(most)
    pages.close()
    keys = [torch.randn(1, kv_heads, length, dim).bfloat16() for length in lengths]
    query = torch.randn(1, query_heads, 1, dim).bfloat16()

    def stock() -> None:
        for key in keys:
            F.scaled_dot_product_attention(query, key, key, enable_gqa=True)

    # Its values are its keys: half of the bytes, which can only help it.
    result["over_stock"] = median_seconds(stock, repeats) / seconds
    result["scaling"] = result[f"gb_per_s_{most}"] / result["gb_per_s_1"]
    return result


def lengths_of_sequences() -> list[int]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(500, 1501, (SEQUENCES,), generator=draw).tolist()


def paged_spans(lengths: list[int], page_tokens: int) -> PagedSpans:
    """The newest row of each sequence, with pages one after another."""
    spans, first = [], 0
    for row, length in enumerate(lengths):
        count = -(-length // page_tokens)
        pages = range(first, first + count)
        spans.append(SpanPages(row, length - 1, length, [*pages], [*range(count)], True))
        first += count
    cpu = torch.device("cpu")
    found = build_group(spans, page_tokens, cpu, Tier.DEVICE, staged=False).paged()
    assert found is not None
    return found


def pools_of(shape: Shape, pages: int, page_tokens: int) -> dict[str, PagedKV]:
    """Random pages in bfloat16, and such pages in four bits: few different ones, repeated."""
    form = KVFormat(torch.bfloat16, GroupFormat())
    assert form.groups is not None
    few = min(pages, 16)
    rows = torch.randn(few * page_tokens * shape.kv_heads * 2, shape.key_dim)
    cells = quantize_minmax(rows, form.groups).view(few, -1).repeat(-(-pages // few), 1)
    plain = torch.randn(pages * page_tokens * shape.kv_heads * 2 * shape.key_dim).bfloat16()
    return {
        "plain": PagedKV.of(plain, shape, page_tokens),
        "packed": PagedKV.of(cells[:pages].flatten(), shape, page_tokens, form),
    }


def decode_packed(name: str, page_tokens: int, repeats: int) -> dict[str, Any]:
    """Both kinds of pages by turns, so that what else the machine does meets both."""
    query_heads, kv_heads, dim = HEADS[name]
    lengths = lengths_of_sequences()
    spans = paged_spans(lengths, page_tokens)
    pools = pools_of(Shape(kv_heads, dim), len(spans.pages), page_tokens)
    query = torch.randn(SEQUENCES, query_heads, dim).bfloat16()
    options = AttentionOptions(scaling=dim**-0.5)
    nbytes = sum(lengths) * pools["packed"].page_bytes / page_tokens
    result: dict[str, Any] = {"heads": name, "page_tokens": page_tokens}
    for threads in sorted({1, torch.get_num_threads()}):
        backend = CpuAttention(threads)
        seconds: dict[str, list[float]] = {kind: [] for kind in pools}
        for _ in range(repeats):
            for kind, pool in pools.items():
                run = lambda p=pool, b=backend: b.attend(query, spans, p, options)  # noqa: E731
                seconds[kind].append(median_seconds(run, 3))
        backend.close()
        plain, packed = (statistics.median(seconds[kind]) for kind in ("plain", "packed"))
        result[f"gb_per_s_{threads}"] = nbytes / packed / 1e9
        result[f"over_plain_{threads}"] = plain / packed
    return result


def prefill(name: str, page_tokens: int, repeats: int) -> dict[str, Any]:
    pages = Pages(HEADS[name], page_tokens, [RowSpan(0, 0, PROMPT, True)])
    backend = CpuAttention()
    seconds = median_seconds(lambda: pages.attend(backend), repeats)
    query, key, value = (t.unsqueeze(0) for t in (pages.query, pages.key, pages.value))

    def stock() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    over = median_seconds(stock, repeats) / seconds
    backend.close()
    pages.close()
    return {"heads": name, "prompt": PROMPT, "seconds": seconds, "over_stock": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--page-tokens", type=int, nargs="+", default=[32])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    with torch.inference_mode():
        decodes = [decode(h, p, given.repeats) for h in HEADS for p in given.page_tokens]
        packed = [decode_packed(h, p, given.repeats) for h in HEADS for p in given.page_tokens]
        prefills = [prefill(h, given.page_tokens[0], given.repeats) for h in HEADS]
    threads = torch.get_num_threads()
    print(
        "| decode, heads | page | GB/s | memory read GB/s | share | target | over torch | scaling |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in decodes:
        print(
            f"| {row['heads']} | {row['page_tokens']} | {row[f'gb_per_s_{threads}']:.1f} | "
            f"{row[f'read_gb_per_s_{threads}']:.1f} | {row[f'share_{threads}']:.0%} | "
            f"{TARGETS[row['heads']]:.0%} | {row['over_stock']:.1f}x | {row['scaling']:.2f} |"
        )
    for row in packed:
        print(
            f"packed {row['heads']}, pages of {row['page_tokens']}: "
            f"{row[f'gb_per_s_{threads}']:.1f} GB/s, {row[f'over_plain_{threads}']:.2f}x the "
            f"tokens of bfloat16 pages (target {PACKED_TARGET}x; on one thread "
            f"{row['over_plain_1']:.2f}x)"
        )
    for row in prefills:
        ratio = f"{row['over_stock']:.2f}x torch's speed (target 0.9x)"
        print(f"prefill {row['heads']}, {PROMPT} tokens: {row['seconds'] * 1e3:.1f} ms, {ratio}")
    found = {"threads": threads, "decode": decodes, "packed": packed, "prefill": prefills}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
