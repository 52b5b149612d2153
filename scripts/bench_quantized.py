"""What 4-bit weights are worth: a random Llama on disk, its sweeps bound by the disk.

The same batch in bfloat16 and with weights of 4 bits, in turn; what crossed the link, what the disk
gives to raw reads of the same files, and how much of the expansion ran while the disk was busy.
Then the kernels alone: quantizing from bfloat16 and expanding to it. The last line on stdout is one
JSON object. Reads go past the page cache.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_links import header, markdown
from make_random_model import make_model

from compression.expansion import expand, quantize
from compression.groupwise import any_rows
from compression.spec import GroupFormat
from flexrun import LLM, SamplingParams
from flexrun.engine import Engine
from offload.timeline import COMPUTE

LEAST_FACTOR = 2.2
"""Targets: of tokens/s in 4 bits over bfloat16's, …"""
LEAST_EXPANSION, LEAST_QUANTIZING = 5e9, 150e6
"""… and bytes per second of bfloat16 that come out of, or go into, the kernels."""
LEFT_OUT = 2
"""Sweeps before the steady ones: the first computes prompts, the second is still filling."""


@dataclass(frozen=True)
class Run:
    """Steady sweeps of one way."""

    seconds: float
    """Of one sweep, median."""
    weights: float
    """Bytes of weights that a sweep reads."""
    raw: float
    """Bytes per second that raw reads of these weights reached before the first sweep."""
    expanding: float
    """Seconds of a sweep in which weights are expanded, …"""
    hidden: float
    """… and the part of them in which the disk is busy, too."""
    computing: float
    """Seconds of a sweep in which anything is computed."""
    tokens: list[tuple[int, ...]]


def run(model: Path, given: argparse.Namespace, bits: int, offload: Path) -> Run:
    """Decode with all weights on disk."""
    draw = random.Random(given.seed)
    prompts = [
        {"prompt_token_ids": draw.choices(range(1, 30000), k=draw.randint(4, 12))}
        for _ in range(given.rows)
    ]
    settings: dict[str, Any] = {
        "device": "cpu",
        "dtype": "bfloat16",
        "weights": "disk=100",
        "kv_cache": "device=100",
        "max_sequences": given.rows,
        "speculation": "off",
        "offload_dir": offload,
        "weight_bits": bits,
        "head_bits": bits,
        "trace": offload / "trace.json",
    }
    with LLM(model, **settings) as llm:
        engine = llm._engine
        assert isinstance(engine, Engine)
        params = SamplingParams(
            temperature=0, max_tokens=given.sweeps + LEFT_OUT + 1, ignore_eos=True
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        summary = llm.summary()
        intervals = engine._runtime.timeline.finish()
        steady = engine._counters.sweep_seconds[LEFT_OUT:-1]
        begins = [i.start for i in intervals if i.name == "start of micro-batch 0"]
        first, last = begins[LEFT_OUT], begins[LEFT_OUT + len(steady)]
        mine = [i for i in intervals if first <= i.start < last]
        compute = [i for i in mine if i.row == COMPUTE]
        expanding = [(i.start, i.end) for i in compute if i.name == "weights"]
        reading = [(i.start, i.end) for i in mine if i.row == "disk->device"]
        sweeps = len(steady)
        return Run(
            statistics.median(steady),
            summary["bytes_by_kind"]["disk->device"]["weights"] / summary["sweeps"],
            summary["links"]["disk->device"]["raw_gb_per_s"] * 1e9,
            sum(end - start for start, end in expanding) / sweeps,
            common(expanding, reading) / sweeps,
            sum(i.end - i.start for i in compute) / sweeps,
            [output.outputs[0].token_ids for output in outputs],
        )


def common(ones: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """Seconds of `ones` in which any of `others` is under way."""
    merged: list[list[float]] = []
    for start, end in sorted(others):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return sum(max(0.0, min(e, b) - max(s, a)) for s, e in ones for a, b in merged)


def kernels(repeats: int) -> dict[str, float]:
    """Bytes of bfloat16 per second, for a matrix of 4096 by 4096."""
    spec = GroupFormat(4, 64)
    values = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, out = quantize(values, spec), torch.empty_like(values)
    mxfp4 = GroupFormat(4, 32, "e8m0")
    floats = any_rows(values.float(), mxfp4)

    def rate(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return values.nbytes / statistics.median(seconds)

    return {
        "quantize": rate(lambda: quantize(values, spec)),
        "expand": rate(lambda: expand(packed, spec, out)),
        "expand_mxfp4": rate(lambda: expand(floats, mxfp4, out)),
        "copy": rate(lambda: out.copy_(values)),
    }


def show(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = []
    for bits in ("16", "4"):
        each = report["runs"][bits]
        rows.append([
            bits,
            f"{each['seconds']:.3f}",
            f"{each['weights'] / 1e6:.0f}",
            f"{each['weights'] / each['seconds'] / 1e9:.2f}",
            f"{each['raw'] / 1e9:.2f}",
            f"{each['computing']:.3f}",
            f"{each['expanding']:.3f}",
            f"{each['hidden'] / each['expanding']:.0%}" if each["expanding"] else "",
        ])  # fmt: skip
    names = ["bits", "sweep, s", "MB read", "GB/s", "raw GB/s", "computing, s", "expanding, s"]
    rates = report["kernels"]
    return "\n".join([
        markdown([*names, "of it while reading"], rows),
        "",
        f"tokens/s in 4 bits over bfloat16: {report['factor']:.2f} "
        f"(each pair {' '.join(f'{f:.2f}' for f in report['factors'])}; target {LEAST_FACTOR}; "
        f"{report['bytes_factor']:.2f} times fewer bytes)",
        f"kernels: expanding {rates['expand'] / 1e9:.1f} GB/s of bfloat16 "
        f"(target {LEAST_EXPANSION / 1e9:.0f}), from MXFP4 {rates['expand_mxfp4'] / 1e9:.1f} GB/s, "
        f"quantizing {rates['quantize'] / 1e6:.0f} MB/s "
        f"(target {LEAST_QUANTIZING / 1e6:.0f}); a copy {rates['copy'] / 1e9:.1f} GB/s",
    ])  # fmt: skip


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--directory", type=Path, required=True, metavar="DIR", help="of model and stores; a disk")
    add("--size", default="1.1b", help="of the model, as make_random_model.py calls it")
    add("--rows", type=int, default=8, help="sequences (%(default)s)")
    add("--sweeps", type=int, default=6, help="that are measured (%(default)s)")
    add("--repeats", type=int, default=3)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    given = read_arguments()
    model, offload = given.directory / f"llama-{given.size}", given.directory / "offload"
    make_model(given.size, model, given.seed, "bfloat16", None)
    runs: dict[int, list[Run]] = {16: [], 4: []}
    run(model, given, 4, offload)  # prepares
    report = header("quantized weights", given.directory)
    for number in range(given.repeats):
        for bits in (16, 4) if number % 2 == 0 else (4, 16):
            runs[bits].append(run(model, given, bits, offload))
    factors = [a.seconds / b.seconds for a, b in zip(runs[16], runs[4])]
    report["factors"], report["factor"] = factors, statistics.median(factors)
    names = ("seconds", "weights", "raw", "expanding", "hidden", "computing")
    report["runs"] = {
        str(bits): {name: statistics.median(getattr(r, name) for r in each) for name in names}
        for bits, each in runs.items()
    }
    report["bytes_factor"] = runs[16][0].weights / runs[4][0].weights
    report["kernels"] = rates = kernels(5)
    report["met"] = (
        report["factor"] >= LEAST_FACTOR
        and rates["expand"] >= LEAST_EXPANSION
        and rates["quantize"] >= LEAST_QUANTIZING
    )
    print(show(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
