"""How well the simulator foretells what a serving system measured: DistServe's published runs.

Its repository (LLMServe/DistServe, in its history under simdistserve/benchmarks/alignment) has the
requests of each run with their lengths, arrivals and latencies: OPT-13B, with DistServe prompts on
two A100s with tensor parallelism and tokens on a third one, with vLLM all on one. The same requests
arrive at the same times on the virtual clock, with DistServe's published fits as costs. Nothing
here is fitted to these runs. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from bench_links import markdown

from flexrun.schedulers import SCHEDULERS
from offload.pages import PagePools
from offload.tiers import Tier
from policy_search.arrivals import TimedRequest
from policy_search.latency import Latencies, Targets
from policy_search.profiles import PROFILES
from policy_search.scenario import MachineKind, Scenario, Split
from policy_search.simulated_machine import Scheduler
from policy_search.simulator import run

TARGETS = Targets(ttft=0.2, tpot=0.1)
"""Seconds, of the run that DistServe's simulator has as its example."""
MOST_DIFFERENCE = 0.05
"""Target: of the share of requests within the targets, mean of all runs."""
PAGE = 16
KINDS = {
    "prompts": ("opt-13b-2xa100", 163_008),
    "tokens": ("opt-13b-a100", 66_144),
    "vllm": ("opt-13b-a100-vllm", 66_144),
}
"""Profile and tokens of the KV cache, as DistServe has measured them."""
NVLINK = 600e9
"""Bytes per second between the GPUs of a machine with A100s."""


def kind(name: str) -> MachineKind:
    """Machines for prompts, for tokens or for both. A sweep has whole prompts, of any number, which
    come first, or a row of every sequence that generates.
    """
    profile_name, tokens = KINDS[name]
    profile = PROFILES[profile_name]

    def make_scheduler() -> Scheduler:
        pools = PagePools({Tier.DEVICE: tokens // PAGE}, PAGE)
        limits = dict.fromkeys(("max_rows", "max_sequences", "micro_batch_rows"), tokens)
        scheduler: Scheduler = SCHEDULERS["phased"](pools, **limits)
        return scheduler

    return MachineKind(make_scheduler=make_scheduler, cost=profile.cost, devices=profile.devices)


def scenario(system: str) -> Scenario:
    """One machine with vLLM, or one of each kind of DistServe's."""
    if system == "vllm":
        return Scenario(kind=kind(system))
    split = Split(
        prompt_machines=1,
        token_machines=1,
        network=NVLINK,
        token_bytes=PROFILES[KINDS["tokens"][0]].kv_token_bytes,
        prompt_kind=kind("prompts"),
    )
    return Scenario(kind=kind("tokens"), split=split)


def summary(ttft: np.ndarray, tpot: np.ndarray, attainment: float) -> dict[str, float]:
    """Of one run, in seconds."""
    found = {"attainment": attainment}
    for name, values in (("ttft", ttft), ("tpot", tpot)):
        p50, p90 = np.nanpercentile(values, [50, 90]).tolist()
        found |= {f"{name}_p50": p50, f"{name}_p90": p90}
    return found


def compare(path: Path) -> dict[str, Any]:
    """A run as it was measured, and simulated; its file's name begins with the system's."""
    rows = ast.literal_eval(path.read_text(encoding="utf-8").split("\n", 1)[0])
    rows.sort(key=lambda row: row["issue_time"])
    start = rows[0]["issue_time"]
    requests = [
        TimedRequest(row["issue_time"] - start, row["prompt_len"], row["output_len"])
        for row in rows
    ]
    ttft, tpot = (np.array([row[name] for row in rows]) / 1000 for name in ("ttft_ms", "tpot_ms"))
    within = float(((ttft <= TARGETS.ttft) & (tpot <= TARGETS.tpot)).mean())
    system = path.stem.partition("-")[0]
    found = Latencies.of(requests, run(scenario(system).cluster(), requests))
    return {
        "run": path.stem,
        "system": system,
        "requests": len(rows),
        "rate": (len(rows) - 1) / (requests[-1].arrival or 1.0),
        "measured": summary(ttft, tpot, within),
        "simulated": summary(found.ttft, found.tpot, TARGETS.met_by(found)),
    }


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    text = "of runs on two GPUs and one, or on one (distserve-c21d11-*.exp, vllm-*.exp)"
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=text)
    results = [compare(path) for path in parser.parse_args().files]
    results.sort(key=lambda each: (each["system"], each["rate"]))
    rows, names = [], ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90")
    for each in results:
        both = each["measured"], each["simulated"]
        shares = " / ".join(f"{one['attainment']:.2f}" for one in both)
        times = [" / ".join(f"{1000 * one[name]:.0f}" for one in both) for name in names]
        rows.append([each["system"], f"{each['rate']:.1f}", each["requests"], shares, *times])
    head = [
        "system",
        "requests/s",
        "requests",
        "within the targets",
        *(f"{name}, ms" for name in names),
    ]
    print(markdown(head, rows))
    print("measured / simulated")
    off = {}
    for system in sorted({each["system"] for each in results}):
        shares = [
            abs(each["measured"]["attainment"] - each["simulated"]["attainment"])
            for each in results
            if each["system"] == system
        ]
        off[system] = statistics.mean(shares)
        met = "met" if off[system] <= MOST_DIFFERENCE else "not met"
        print(
            f"{system}: shares within the targets differ by {off[system]:.3f}, mean of "
            f"{len(shares)} runs (target {MOST_DIFFERENCE:.2f}: {met})"
        )
    print(json.dumps({"benchmark": "simulator", "difference": off, "runs": results}))


if __name__ == "__main__":
    main()
