"""What attention on HOST is worth: KV pages that stay where they are against pages that move.

On the emulated device, whose link from HOST has a stated speed, a random Llama with much KV cache
decodes with its pages on HOST in three ways: moved to the device, attended to there, and as `auto`
splits them. Each is held against what the cost model predicts: from the link's speed, from what the
sequences compute with their pages on the device and with hardly any pages, from the speed of the
processor's attention alone, and from what compute and attention lose while both work, for they
share memory. One thread computes and one attends, so that they have a core each. The last line on
stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_links import header, markdown
from make_random_model import Shape, write_model

from flexrun import LLM, SamplingParams
from flexrun.engine import Engine
from offload.tiers import parse_size
from offload.timeline import COMPUTE
from policy_search.cost_model import SweepWork, best_host_share, sweep_seconds

if TYPE_CHECKING:
    from flexrun.attention_split import AttentionSplit
    from policy_search.hardware import Hardware

LEAST_SHARE = 0.85
"""Target: of the predicted factor between moving pages and attending to them on HOST."""
WAYS = {
    "no pages": {"kv_cache": "device=100"},
    "on the device": {"kv_cache": "device=100"},
    "moved": {"kv_cache": "host=100", "attention": "device"},
    "on host": {"kv_cache": "host=100", "attention": "host"},
    "auto": {"kv_cache": "host=100", "attention": "auto"},
}
SHORT = 8
"""Tokens of a prompt where there are to be hardly any pages."""
LEFT_OUT = 2
"""Of the decode sweeps: the first, and the last."""


@dataclass(frozen=True)
class Run:
    """Steady decode sweeps of one way."""

    seconds: float
    """Of one sweep: the median."""
    kv_bytes: float
    """Pages that a sweep's rows attend to."""
    overlap: float
    """Part of the processor's attention that runs while the device computes."""
    around: float
    """Seconds of a sweep before its first layer and after its last one."""
    hardware: Hardware | None
    tokens: list[tuple[int, ...]]


def run(model: Path, given: argparse.Namespace, way: str) -> Run:
    """Decode all sequences in one of the `WAYS`."""
    draw = random.Random(given.seed)
    context = SHORT if way == "no pages" else given.context
    low, high = context // 2, context * 3 // 2
    prompts = [
        {"prompt_token_ids": draw.choices(range(1, given.vocab), k=draw.randint(low, high))}
        for _ in range(given.sequences)
    ]
    link = f"{given.link}/s"
    settings: dict[str, Any] = {
        "device": "emulated",
        "emulate": f"host-to-device={link},device-to-host={link}",
        "dtype": "float32",
        "weights": "device=100",
        "max_sequences": given.sequences,
        "num_micro_batches": given.micro_batches,
        "micro_batch_rows": 1024,
        "max_rows": 2 * given.sequences * given.context,  # all prompts in one sweep
        "trace": model / "trace.json",
        "seed": 0,
    }
    with LLM(model, **settings, **WAYS[way]) as llm:
        engine = llm._engine
        assert isinstance(engine, Engine)
        runtime = engine._runtime
        scheduler, plans = runtime.scheduler, []
        next_sweep = scheduler.next_sweep
        scheduler.next_sweep = lambda _=None: plans.append(next_sweep()) or plans[-1]  # type: ignore
        params = SamplingParams(temperature=0, max_tokens=given.sweeps + LEFT_OUT, ignore_eos=True)
        llm.generate(prompts, params, use_tqdm=False)  # pages are memory when first written
        first = len(plans)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        page = runtime.policy.page_tokens
        decodes = [i for i in range(first, len(plans)) if plans[i].rows == given.sequences]
        steady = decodes[1:-1]
        decoded = [
            sum(-(-s.end // page) * page for b in plans[i].micro_batches for s in b.spans)
            for i in steady
        ]
        seconds = statistics.median(engine._counters.sweep_seconds[i] for i in steady)
        intervals = runtime.timeline.finish()
        spans = spans_of_layers(intervals, given)
        in_layers = statistics.median(spans[i] for i in steady)
        return Run(
            seconds,
            statistics.mean(decoded) * runtime.shape.kv_token_bytes,
            overlap_of(intervals),
            seconds - in_layers,
            speeds(runtime._split, given) if way == "auto" else None,
            [output.outputs[0].token_ids for output in outputs],
        )


def speeds(split: AttentionSplit, given: argparse.Namespace) -> Hardware:
    """Those that were measured, and what attention and the device's compute lose while both work.

    A layer's compute is about a matrix of all its weights, multiplied with each micro-batch's rows.
    """
    assert split.hardware is not None
    attention = 2 * given.hidden * (given.heads + given.kv_heads) // given.heads
    values = attention + 3 * 2 * given.hidden  # of a layer, for each of its inputs
    matrices = [torch.ones(values, given.hidden) for _ in range(given.layers)]
    rows = torch.ones(given.sequences // given.micro_batches, given.hidden)
    layers = itertools.cycle(matrices)

    def compute() -> None:
        matrix = next(layers)
        for _ in range(given.micro_batches):
            torch.nn.functional.linear(rows, matrix)

    return replace(split.hardware, contention=split.measured_speed(compute).contention)


def spans_of_layers(intervals: list[Any], given: argparse.Namespace) -> list[float]:
    """Seconds of each sweep from its first layer's beginning to its last one's end."""
    sweeps = [i.start for i in intervals if i.name == "start of micro-batch 0"]
    spans = []
    for begin, until in zip(sweeps, [*sweeps[1:], math.inf]):
        mine = [i for i in intervals if i.row == COMPUTE and begin <= i.start < until]
        first = min(i.start for i in mine if "unit 0," in i.name)
        last = max(i.end for i in mine if f"unit {given.layers - 1}," in i.name)
        spans.append(last - first)
    return spans


def overlap_of(intervals: list[Any]) -> float:
    """Share of the time of attention on HOST in which compute is busy, too."""
    rows: dict[str, list[tuple[float, float]]] = {"host attention": [], COMPUTE: []}
    for each in intervals:
        if each.row in rows:
            rows[each.row].append((each.start, each.end))
    total = both = 0.0
    for start, end in rows["host attention"]:
        total += end - start
        both += sum(max(0.0, min(end, e) - max(start, s)) for s, e in rows[COMPUTE])
    return both / total if total else 0.0


def predicted(runs: dict[str, Run], link: float, stages: int) -> dict[str, float]:
    """Seconds of a sweep in each way, by the cost model."""
    around = runs["no pages"].around
    rest, alone = (runs[way].seconds - around for way in ("no pages", "on the device"))
    hardware = runs["auto"].hardware
    assert hardware is not None
    hardware = replace(hardware, host_to_device=link)
    kv = round(runs["moved"].kv_bytes)
    sweep = SweepWork(weights=0, host_kv=kv, around=around, stages=stages)
    moved, there = replace(sweep, compute=alone), replace(sweep, compute=rest)
    share = best_host_share(there, hardware)
    mixed = replace(sweep, compute=rest + (1 - share) * (alone - rest))
    return {
        "moved": sweep_seconds(moved, hardware, 0.0),
        "on host": sweep_seconds(there, hardware, 1.0),
        "auto": sweep_seconds(mixed, hardware, share),
    }


def measure(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All ways in turn, several times, every second time in the other order.

    Each finds memory as the one before has left it.
    """
    pairs = []
    for number in range(given.repeats):
        order = list(WAYS)[:: -1 if number % 2 else 1]
        runs = {way: run(model, given, way) for way in order}
        foreseen = predicted(runs, parse_size(given.link), given.layers * given.micro_batches)
        hardware = runs["auto"].hardware
        assert hardware is not None
        pairs.append({
            "seconds": {way: each.seconds for way, each in runs.items()},
            "predicted": foreseen,
            "factor": {w: runs["moved"].seconds / runs[w].seconds for w in ("on host", "auto")},
            "predicted_factor": {w: foreseen["moved"] / foreseen[w] for w in ("on host", "auto")},
            "kv_bytes": runs["moved"].kv_bytes,
            "attention_gb_per_s": hardware.host_attention / 1e9,
            "contention": hardware.contention,
            "overlap": runs["on host"].overlap,
            "identical": len({str(runs[way].tokens) for way in WAYS if way != "no pages"}) == 1,
        })  # fmt: skip
    share = {
        way: statistics.median(p["factor"][way] / p["predicted_factor"][way] for p in pairs)
        for way in ("on host", "auto")
    }
    met = share["on host"] >= LEAST_SHARE
    return {"pairs": pairs, "share": share, "met": met, "link": given.link}


def show(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = []
    for way in WAYS:
        seconds = statistics.median(p["seconds"][way] for p in report["pairs"])
        limit = [p["predicted"][way] for p in report["pairs"] if way in p["predicted"]]
        rows.append([
            way,
            f"{1e3 * seconds:.0f}",
            f"{1e3 * statistics.median(limit):.0f}" if limit else "",
            *(f"{statistics.median(p[f][way] for p in report['pairs']):.2f}"
              if way in report["share"] else "" for f in ("factor", "predicted_factor")),
        ])  # fmt: skip
    names = ["pages", "ms a sweep", "predicted", "times faster than moved", "predicted"]
    pair = report["pairs"][-1]
    overlap = statistics.median(p["overlap"] for p in report["pairs"])
    return "\n".join([
        markdown(names, rows),
        "",
        f"{pair['kv_bytes'] / 1e6:.0f} MB of pages a sweep, a link of {report['link']}/s, "
        f"attention at {pair['attention_gb_per_s']:.1f} GB/s, of which it and compute lose "
        f"{pair['contention']:.0%} while both work; {overlap:.0%} of it while the device computes",
        f"factor reached over factor predicted: {report['share']['on host']:.2f} "
        f"(target {LEAST_SHARE}), auto {report['share']['auto']:.2f}",
    ])  # fmt: skip


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=24)
    add("--hidden", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=4)
    add("--vocab", type=int, default=1024)
    add("--sequences", type=int, default=64)
    add("--context", type=int, default=1000, help="tokens of a prompt, on average")
    add("--micro-batches", type=int, default=2)
    add("--link", default="1GB", metavar="SIZE", help="bytes per second from HOST to the device")
    add("--sweeps", type=int, default=8, help="decode sweeps that are measured")
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=1, help="that compute, and that attend")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    given = read_arguments()
    torch.set_num_threads(given.threads)
    shape = Shape(
        given.layers, given.hidden, given.heads, given.kv_heads, 2 * given.hidden, given.vocab, 8192
    )
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        write_model(model, shape, "float32", given.seed)
        report = header("host attention", model) | measure(model, given)
    print(show(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
