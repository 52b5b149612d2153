"""What mixing prompts into decode sweeps is worth: against prompts and decodes one after the other.

On the emulated device, whose link has a stated speed, a random Llama completes a job whose prompts
take as long to compute as its decode sweeps' weights take to arrive: first one phase at a time,
which says what each phase takes alone, and then mixed. The limit is the longer phase. The last line
on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_links import header, markdown
from make_random_model import Shape, write_model

from flexrun import LLM
from flexrun.bench import make_requests
from flexrun.engine import Engine
from policy_search.workload import Workload

LEAST_SHARE = 0.85
"""Target: the longer phase alone over the mixed job."""


def run(model: Path, given: argparse.Namespace, link: float, scheduler: str) -> dict[str, Any]:
    """One job; seconds of its sweeps with and without rows of prompts, and all tokens."""
    settings: dict[str, Any] = {
        "device": "emulated",
        "emulate": f"host-to-device={round(link)}/s",
        "dtype": "float32",
        "weights": "host=100",
        "max_sequences": given.slots,
        "scheduler": scheduler,
        "speculation": "off",
    }
    if scheduler == "phased":
        settings["max_rows"] = 512
    work = Workload(
        workload="fixed", requests=given.requests, prompt_len=given.prompt, gen_len=given.output
    )
    with LLM(model, **settings) as llm:
        engine = llm._engine
        assert isinstance(engine, Engine)
        scheduler_, plans = engine._runtime.scheduler, []
        next_sweep = scheduler_.next_sweep
        scheduler_.next_sweep = lambda _=None: plans.append(next_sweep()) or plans[-1]  # type: ignore
        for request in make_requests(work, engine.vocab_size):
            engine.add_request(request)
        tokens: dict[int, tuple[int, ...]] = {}
        while engine.has_unfinished:
            tokens |= {done.index: done.outputs[0].token_ids for done in engine.step()}
        phases = {"prompts": 0.0, "decode": 0.0}
        for plan, seconds in zip(plans, engine._counters.sweep_seconds):
            kind = "prompts" if any(span.length > 1 for span in plan.spans) else "decode"
            phases[kind] += seconds
        rows = [plan.rows for plan in plans if not plan.empty]
        return {
            "seconds": sum(engine._counters.sweep_seconds),
            "sweeps": len(engine._counters.sweep_seconds),
            "decode_sweeps": sum(all(s.length == 1 for s in p.spans) for p in plans if p.spans),
            "phases": phases,
            "free_rows": engine._runtime.scheduler.free_rows,
            "median_rows": statistics.median(rows),
            "weights": engine._runtime.weights.store.streamed_bytes,
            "tokens": [tokens[index] for index in sorted(tokens)],
        }


def measure(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Find the link's speed at which both phases take as long, then compare."""
    first = run(model, given, 100e9, "phased")
    link = first["weights"] * first["decode_sweeps"] / first["phases"]["prompts"]
    pairs = []
    for _ in range(given.repeats):
        apart, mixed = (run(model, given, link, kind) for kind in ("phased", "continuous"))
        identical = apart.pop("tokens") == mixed.pop("tokens")
        share = max(apart["phases"].values()) / mixed["seconds"]
        pairs.append({"apart": apart, "mixed": mixed, "identical": identical, "share": share})
    share = statistics.median(pair["share"] for pair in pairs)
    return {"link": link, "pairs": pairs, "share": share, "met": share >= LEAST_SHARE}


def show(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = []
    for pair in report["pairs"]:
        apart, mixed = pair["apart"], pair["mixed"]
        rows.append([
            *(f"{apart['phases'][kind]:.1f}" for kind in ("prompts", "decode")),
            f"{apart['seconds']:.1f}",
            f"{mixed['seconds']:.1f}",
            f"{mixed['free_rows']}",
            f"{apart['seconds'] / mixed['seconds']:.2f}",
            f"{pair['share']:.2f}",
            "yes" if pair["identical"] else "no",
        ])  # fmt: skip
    names = ["prompts s", "decode s", "apart s", "mixed s", "free rows", "times faster"]
    names += ["longer phase over mixed", "same tokens"]
    return "\n".join([
        markdown(names, rows),
        "",
        f"a link of {report['link'] / 1e9:.2f} GB/s; longer phase alone over the mixed job: "
        f"{report['share']:.2f} (target {LEAST_SHARE})",
    ])  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=2)
    add("--hidden", type=int, default=768)
    add("--requests", type=int, default=512)
    add("--slots", type=int, default=16)
    add("--prompt", type=int, default=1024)
    add("--output", type=int, default=32)
    add("--repeats", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = Shape(given.layers, given.hidden, 12, 12, 2 * given.hidden, 1024, 8192)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        write_model(model, shape, "float32", 0)
        report = header("schedule", model) | measure(model, given)
    print(show(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
