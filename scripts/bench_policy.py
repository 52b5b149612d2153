"""How well plans are predicted, and whether the one that is picked is the best.

Settings are emulated devices with links of stated speeds, and this machine's CPU with its disk and
without. In each, the machine is measured as jobs measure it, one job of the automatic policy runs,
whose corrections are kept, and then every policy of a list is predicted (the engine's scheduler on
a virtual clock) and run, for two workloads. A job that others slow down is slowed down for a while:
so the list is run in rounds, every policy in two, in a third if these two differ by a tenth, and
short jobs in up to five. Each run is held against what was foreseen of it just before, for the
machine may be another a quarter of an hour later; a policy's error is that of the median of its
runs' ratios. Corrections are of the last five runs (of each resource: of those that it was busy
in): what follows a policy's own run by fewer others has seen it, and does not count. The worst of
the first runs alone stands beside the worst of the medians. At last the policy that the planner
picks is run, five times in turn with the best of the list; how much longer the longest of these
five took than the shortest says what the machine's noise is. How one round of the list ranks the
others' times says how well times can be ranked here at all. The last line on stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from bisect import bisect_left, bisect_right
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_links import drop_caches, header, markdown
from make_random_model import Shape, write_model

from flexrun.arguments import engine_config
from flexrun.bench import run_bench
from flexrun.engine import Engine
from flexrun.errors import CapacityError
from flexrun.machine import offload_directory, open_backend
from flexrun.model import load_config
from flexrun.planning_speeds import PlanningSpeeds
from flexrun.schedulers import make_scheduler
from offload.pages import PagePools
from offload.tiers import Split
from policy_search.__main__ import main as policy_search
from policy_search.corrections import REMEMBERED
from policy_search.machine import multiplies_bfloat16
from policy_search.policy import Policy
from policy_search.simulator import simulate
from policy_search.workload import Workload

MOST_MEDIAN, MOST_ERROR, LEAST_RANK, LEAST_OF_BEST = 0.10, 0.20, 0.9, 0.95
TURNS = 5
"""Of the picked policy and the best of the list; and most rounds of the list."""
ENOUGH = 10.0
"""Seconds of one policy's jobs in all rounds after which it needs no other round, …"""
ALIKE = 1.1
"""… unless the first two have taken times of another ratio than this."""
MODEL = Shape(layers=8, hidden=1024, heads=16, kv_heads=4, ffn=2816, vocab=4096, context=1024)
DTYPE, TWICE = ("bfloat16", 1) if multiplies_bfloat16() else ("float32", 2)
"""What this CPU multiplies fast; with twice the bytes, memory is as small beside the model, and
emulated links are as slow, if there is twice as much of both."""
DEVICE = f"capacity={160 * TWICE}MiB"
SETTINGS = {
    "emulated, slow link": {
        "device": "emulated",
        "emulate": f"{DEVICE},host-to-device={TWICE}GB/s,device-to-host={TWICE}GB/s",
    },
    "emulated, fast link": {
        "device": "emulated",
        "emulate": f"{DEVICE},host-to-device={4 * TWICE}GB/s,device-to-host={4 * TWICE}GB/s",
    },
    "emulated, slow disk": {
        "device": "emulated",
        "emulate": f"{DEVICE},host-to-device={4 * TWICE}GB/s,disk-read={TWICE}GB/s",
        "host_memory": f"{160 * TWICE}MiB",
    },
    "cpu, in memory": {"device": "cpu"},
    "cpu, disk": {"device": "cpu", "device_memory": f"{128 * TWICE}MiB"},
}
WORKLOADS = {
    "conversations": Workload(workload="conv", scale=0.05, requests=40),
    "fixed": Workload(workload="fixed", prompt_len=64, gen_len=16, requests=24),
}


@dataclass(frozen=True)
class Outcome:
    """One run of a policy on one machine with one workload."""

    policy: Policy
    predicted: float
    measured: float
    unseen: bool = True
    """Whether the prediction knew no run of this policy."""

    @property
    def ratio(self) -> float:
        """What was foreseen, of what it took."""
        return self.predicted / self.measured


@dataclass(frozen=True)
class Rounds:
    """All runs of one policy, the first first."""

    runs: list[Outcome]

    @property
    def policy(self) -> Policy:
        """The one that was run."""
        return self.runs[0].policy

    @property
    def predicted(self) -> float:
        """Median seconds as foreseen."""
        return statistics.median(each.predicted for each in self.runs if each.unseen)

    @property
    def measured(self) -> float:
        """Median seconds as they were."""
        return statistics.median(each.measured for each in self.runs)

    @property
    def later(self) -> float:
        """Median seconds of all runs but the first."""
        return statistics.median(each.measured for each in self.runs[1:] or self.runs)

    @property
    def error(self) -> float:
        """How far the median run's ratio is from 1."""
        return abs(statistics.median(each.ratio for each in self.runs if each.unseen) - 1)

    @property
    def first_error(self) -> float:
        """Of the first run alone."""
        return abs(self.runs[0].ratio - 1)


def policies(unified: bool, disk: bool) -> list[Policy]:
    """By hand: what a person would try, in no order."""
    weights = ["device=100", "device=50,disk=50", "disk=100"] if unified else [
        "host=100", "device=25,host=75", "device=45,host=55",
    ]  # fmt: skip
    if disk:
        weights = ["disk=100", "device=20,disk=80", "device=10,disk=90"]
    pages = ["device=100"] if unified else ["device=100", "host=100"]
    batches = [(8, 64, 128), (16, 128, 256), (32, 128, 512)]
    if unified:
        batches += [(4, 32, 64), (24, 256, 256), (48, 64, 256), (64, 256, 512)]
    if not unified:
        batches += [(24, 64, 256)]
    return [
        Policy(
            weights=Split.parse(placed),
            kv_cache=Split.parse(kv),
            max_sequences=running,
            micro_batch_rows=rows,
            max_rows=most,
            speculation="off",
        )
        for placed in weights
        for kv in pages
        for running, rows, most in batches
    ]


def open_engine(model: Path, settings: dict[str, Any], **given: Any) -> Engine:
    """With what a setting says."""
    config = engine_config({"model": str(model), **settings, **given})
    return Engine(config, None)


def run(model: Path, settings: dict[str, Any], job: Workload, policy: Policy | None) -> Outcome:
    """One job: its seconds as the planner foresees them, and as they were."""
    drop_caches()
    lengths = job.lengths()
    given: dict[str, Any] = {"policy": policy, "job_lengths": job.job()}
    if policy is None:
        given["speculation"] = "off"
    with closing(open_engine(model, settings, **given)) as engine:
        runtime = engine._runtime
        assert runtime.foresight is not None
        found = runtime.policy
        pools = runtime.pools
        there = {t: n for t, n in pools.capacity.items() if t is not pools.swap}
        own = PagePools(there, found.page_tokens, tails=found.max_sequences)
        scheduler = make_scheduler(found, own)
        scheduler.free_rows = runtime.scheduler.free_rows
        cost = runtime.foresight.cost.terms
        predicted = simulate(scheduler, lengths, cost, max_tokens=job.max_tokens)
        measured: float = run_bench(engine, job)["seconds"]
        shape = f"{found.weights} {found.kv_cache}, {found.max_sequences} sequences, "
        shape += f"{found.micro_batch_rows} of {found.max_rows} rows"
        outcome = Outcome(found, predicted.makespan_seconds, measured)
        print(f"{shape}: {measured:.2f} s, predicted {outcome.ratio:.2f} of it", file=sys.stderr)
        return outcome


def run_in_rounds(
    model: Path, settings: dict[str, Any], job: Workload, listed: list[Policy]
) -> list[Rounds]:
    """Each policy that fits, in as many rounds as it needs."""
    runs: dict[int, list[Outcome]] = {number: [] for number in range(len(listed))}
    order: list[int] = []
    for _ in range(TURNS):
        for number, policy in enumerate(listed):
            if number not in runs or settled([each.measured for each in runs[number]]):
                continue
            try:
                outcome = run(model, settings, job, policy)
            except CapacityError as error:
                if not runs[number]:
                    del runs[number]
                print(f"{policy.weights} does not fit: {error.message}", file=sys.stderr)
                continue
            unseen = number not in order[-REMEMBERED:]
            runs[number].append(replace(outcome, unseen=unseen))
            order.append(number)
    return [Rounds(them) for them in runs.values()]


def settled(seconds: list[float]) -> bool:
    """Whether a policy whose rounds took these needs no other one."""
    if len(seconds) < 2 or (len(seconds) == 2 and max(seconds) > ALIKE * min(seconds)):
        return False
    return sum(seconds) >= ENOUGH


def rank_correlation(*both: list[float]) -> float:
    """Spearman's, of two lists of seconds of the same policies."""
    ranks = []
    for values in both:
        ordered = sorted(values)
        # Of equal ones the middle of their places.
        ranks.append([bisect_left(ordered, each) + bisect_right(ordered, each) for each in values])
    return statistics.correlation(*ranks)


def calibrate(model: Path, settings: dict[str, Any]) -> None:
    """Measure the machine as `policy-search calibrate` does, and the model as its first job that
    needs a plan.
    """
    words = ["calibrate", "--device", settings["device"], "--seconds", "20"]
    words += ["--emulate", settings["emulate"]] if "emulate" in settings else []
    assert policy_search(words) == 0
    with closing(open_engine(model, settings)) as engine:
        shape, dtype = engine._runtime.shape, engine._runtime.dtype
    # With the room that later jobs need to find it.
    room = {name: value for name, value in settings.items() if name != "device_memory"}
    planned = engine_config({"model": str(model), **room})
    with closing(open_backend(planned)) as backend:
        where = backend, offload_directory(planned)
        PlanningSpeeds(dtype, *where, planned.emulate, load_config(model)).hardware(shape)


def measure(model: Path, name: str, job: Workload, most: int, calibrating: bool) -> dict[str, Any]:
    """All policies of one setting and workload."""
    settings = SETTINGS[name]
    unified, disk = settings["device"] == "cpu", "disk" in name
    if calibrating:
        calibrate(model, settings)
        run(model, settings, replace(job, requests=2 * job.requests), None)
    outcomes = run_in_rounds(model, settings, job, policies(unified, disk)[:most])
    best = min(outcomes, key=lambda each: each.measured)
    picked, again = [], []
    for _ in range(TURNS):
        picked.append(run(model, settings, job, None))
        again.append(run(model, settings, job, best.policy).measured)
    errors = [each.error for each in outcomes]
    measured = [each.measured for each in outcomes]
    first, later = [each.runs[0].measured for each in outcomes], [each.later for each in outcomes]
    return {
        "policies": len(outcomes),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "worst_first_error": max(each.first_error for each in outcomes),
        "rank_correlation": rank_correlation([each.predicted for each in outcomes], measured),
        "rank_of_rounds": rank_correlation(first, later),
        "of_best": statistics.median(again) / statistics.median(p.measured for p in picked),
        "repeated": max(again) / min(again) - 1,
        "picked": str(picked[0].policy.weights) + " " + str(picked[0].policy.kv_cache),
        "best": str(best.policy.weights) + " " + str(best.policy.kv_cache),
        "outcomes": [as_json(each) for each in [*outcomes, Rounds(picked)]],
    }


def as_json(rounds: Rounds) -> dict[str, Any]:
    """Seconds as foreseen and as they were, round by round."""
    return {
        "policy": json.loads(rounds.policy.to_json()),
        "predicted": [each.predicted for each in rounds.runs],
        "measured": [each.measured for each in rounds.runs],
        "unseen": [each.unseen for each in rounds.runs],
    }


def show(report: dict[str, Any]) -> str:
    """The results for people."""
    rows = [
        [key, each["policies"], f"{each['median_error']:.0%}", f"{each['worst_error']:.0%}",
         f"{each['worst_first_error']:.0%}", f"{each['rank_correlation']:.2f}",
         f"{each['rank_of_rounds']:.2f}", f"{each['of_best']:.2f}", f"{each['repeated']:.0%}"]
        for key, each in report["results"].items()
    ]  # fmt: skip
    names = [
        "setting, workload",
        "policies",
        "median error",
        "worst",
        "of first runs",
        "Spearman",
        "of rounds",
        "of the best",
        "same job",
    ]
    return markdown(names, rows)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    add("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    add("--policies", type=int, default=24, help="most of each setting (%(default)s)")
    given = parser.parse_args()
    if given.policies < 2:
        parser.error(f"--policies {given.policies}: ranks are of at least two; give 2 or more")
    return given


def main() -> None:
    """Measure and print."""
    given = read_arguments()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        os.environ["FLEXRUN_CACHE"] = str(Path(directory, "cache"))
        os.environ["FLEXRUN_OFFLOAD_DIR"] = str(Path(directory, "offload"))
        report: dict[str, Any] = header("policy", Path(directory).absolute())
        report["dtype"] = DTYPE
        torch.manual_seed(0)
        model = Path(directory, "model")
        model.mkdir()
        write_model(model, MODEL, DTYPE, 0)
        report["results"] = {}
        for name in given.settings:
            for number, workload in enumerate(given.workloads):
                job = WORKLOADS[workload]
                found = measure(model, name, job, given.policies, calibrating=not number)
                report["results"][f"{name}; {workload}"] = found
                print(show(report), flush=True)
    results = report["results"].values()
    report["met"] = {
        "median": max(each["median_error"] for each in results) <= MOST_MEDIAN,
        "worst": max(each["worst_error"] for each in results) <= MOST_ERROR,
        "rank": min(each["rank_correlation"] for each in results) >= LEAST_RANK,
        "picked": min(each["of_best"] for each in results) >= LEAST_OF_BEST,
    }
    print(f"\n{show(report)}\n\n{report['met']}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
