"""Speed of the Triton attention kernels on a GPU, against what its memory and torch reach.

Decoding is bound by memory: what counts is the bytes of keys and values per second, compared with
the fastest of a copy and a sum over a large tensor. Pages in groups of 4 bits have 3.6 times fewer
bytes: what counts is the time of pages in bfloat16 over theirs. Prefill is bound by arithmetic:
what counts is the time against torch's flash attention. All is replayed from CUDA graphs, so that
launches by Python cost nothing on either side. The last line on stdout is one JSON object. Exit
code 1: below a target; 2: no GPU or no Triton.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from compression.spec import GroupFormat
from flexrun.attention.gpu import paged_attention, triton_available
from flexrun.paused_forward import AttentionOptions
from offload.kv_layout import PagedSpans
from offload.paged_kv import KVFormat, PagedKV

DECODE_TARGET, PACKED_TARGET, PREFILL_TARGET = 0.8, 1.8, 0.7
GROUPS = GroupFormat(4, 64)
PAGE_TOKENS = 16
LAYERS = 4
"""Pools that are read in turn, so that no cache keeps one until its next turn."""


@dataclass(frozen=True)
class Shape:
    """What one layer stores per token."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Model:
    """Heads of one layer."""

    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads}x{self.dim}"


MODELS = (Model(32, 8, 128), Model(9, 3, 64))


def seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    """Median time of one of `calls`, which are run one after the other."""
    for call in calls:  # compiles
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # results stay apart, as those of layers do
    times: list[float] = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    del kept
    return statistics.median(times[2:])


def memory_speed(repeats: int) -> float:
    """Bytes per second of the GPU's memory: the best that plain operations reach."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds([lambda: target.copy_(source)], repeats)
    read = source.nbytes / seconds([lambda: source.sum()], repeats)
    return max(copy, read)


def random_pool(shape: Shape, pages: int, form: KVFormat) -> PagedKV:
    """Any keys and values of about 1."""
    data = torch.empty(pages * form.page(shape, PAGE_TOKENS), dtype=form.cells, device="cuda")
    if form.groups is None:
        return PagedKV.of(data.normal_(), shape, PAGE_TOKENS, form)
    pool = PagedKV.of(data.random_(0, 256), shape, PAGE_TOKENS, form)
    for side, dim in ((pool.keys, shape.key_dim), (pool.values, shape.value_dim)):
        numbers = side[..., form.groups.code_bytes(dim) :].view(torch.bfloat16)
        groups = form.groups.groups(dim)
        numbers[..., :groups], numbers[..., groups:] = 0.25, 0.0  # scales and centres
    return pool


def batch(
    model: Model, rows: int, lengths: list[int], groups: GroupFormat | None = None
) -> tuple[torch.Tensor, list[PagedKV], PagedSpans]:
    """Spans that end at `lengths`, each with `rows` new rows: queries, pools of layers, spans."""
    pages = [-(-length // PAGE_TOKENS) for length in lengths]
    shape = Shape(model.kv_heads, model.dim, model.dim)
    made: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    form = KVFormat(torch.bfloat16, groups)
    pools = [random_pool(shape, sum(pages), form) for _ in range(LAYERS)]
    columns = {
        "first_row": torch.arange(len(lengths)) * rows,
        "num_rows": torch.full((len(lengths),), rows),
        "first_position": torch.tensor(lengths) - rows,
        "table_start": torch.tensor([0, *pages]).cumsum(0),
        "pages": torch.randperm(sum(pages)),
        "indices": torch.cat([torch.arange(count) for count in pages]),
    }
    tensors: dict[str, Any] = {k: v.to("cuda", torch.int32) for k, v in columns.items()}
    spans = PagedSpans(**tensors, most_rows=rows, most_pages=max(pages))
    query = torch.randn(model.heads, rows * len(lengths), model.dim, **made)
    return query.transpose(0, 1), pools, spans


def timed_decode(
    model: Model, lengths: list[int], groups: GroupFormat | None, repeats: int
) -> tuple[float, float]:
    """Seconds of one row of each sequence, and bytes of pages in a second."""
    query, pools, spans = batch(model, 1, lengths, groups)
    options = AttentionOptions(scaling=model.dim**-0.5)
    calls = [lambda pool=pool: paged_attention(query, pool, spans, options) for pool in pools]
    time = seconds(calls, repeats)
    return time, pools[0].raw.nbytes / time


def bench_decode(
    model: Model, count: int, length: int, memory: float, repeats: int
) -> list[dict[str, Any]]:
    """One row of each of `count` sequences of `length` positions, in pages of both kinds."""
    kinds = None, GROUPS
    times, speeds = zip(*(timed_decode(model, [length] * count, kind, repeats) for kind in kinds))
    results = (
        ("decode", speeds[0] / memory, "memory speed", DECODE_TARGET),
        ("4 bits", times[0] / times[1], "tokens of bfloat16", PACKED_TARGET),
    )
    return [
        {
            "case": f"{name} {count} x {length}",
            "heads": str(model),
            "microseconds": time * 1e6,
            "kv_gb_per_s": speed / 1e9,
            "share": share,
            "of": of,
            "target": target,
        }
        for time, speed, (name, share, of, target) in zip(times, speeds, results)
    ]


def bench_prefill(model: Model, length: int, repeats: int) -> dict[str, Any]:
    """A whole prompt, against torch's flash attention with keys already repeated for its heads."""
    query, pools, spans = batch(model, length, [length])
    options = AttentionOptions(scaling=model.dim**-0.5)
    time = seconds([lambda: paged_attention(query, pools[0], spans, options)], repeats)
    keys, values = (
        t.repeat_interleave(model.heads // model.kv_heads, 1)[:, :, :length]
        for t in pools[0].gather(spans.pages.view(1, -1))
    )
    rows = query.transpose(0, 1).unsqueeze(0)

    def flash() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(rows, keys, values, is_causal=True)

    theirs = seconds([flash], repeats)
    operations = 2 * model.heads * length * length * model.dim  # two products, half of each
    return {
        "case": f"prefill {length}",
        "heads": str(model),
        "microseconds": time * 1e6,
        "torch_microseconds": theirs * 1e6,
        "tflop_per_s": operations / time / 1e12,
        "share": theirs / time,
        "of": "torch's speed",
        "target": PREFILL_TARGET,
    }


def main() -> int:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="runs that a median is taken of")
    repeats = parser.parse_args().repeats
    missing = "CUDA GPU" if not torch.cuda.is_available() else "Triton"
    if missing == "CUDA GPU" or not triton_available():
        print(f"error: no {missing} here\nhint: run this on an NVIDIA GPU", file=sys.stderr)
        return 2
    memory = memory_speed(repeats)
    rows = [row for model in MODELS for row in bench_decode(model, 64, 2048, memory, repeats)]
    rows += [bench_prefill(m, length, repeats) for m in MODELS for length in (2048, 8192)]
    name = torch.cuda.get_device_name()
    print(f"{name}: memory {memory / 1e9:.0f} GB/s")
    for row in rows:
        rate = row.get("kv_gb_per_s"), "GB/s"
        if rate[0] is None:
            rate = row["tflop_per_s"], "TFLOP/s"
        print(
            f"{row['case']:<18} {row['heads']:<9} {row['microseconds']:9.1f} us "
            f"{rate[0]:8.1f} {rate[1]:<8} {row['share']:4.0%} of {row['of']} "
            f"(target {row['target']:.0%})"
        )
    reached = all(row["share"] >= row["target"] for row in rows)
    report: dict[str, Any] = {"benchmark": "attention_gpu", "gpu": name, "torch": torch.__version__}
    report |= {"memory_gb_per_s": memory / 1e9, "reached": reached, "rows": rows}
    print(json.dumps(report))
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
