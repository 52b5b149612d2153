"""Proof of overlap: how close a sweep comes to the time of its busiest link, or of its compute.

emulated: a random Llama whose weights (and KV cache) cross links of a stated speed, chosen so that
the links take twice, once and half the time of compute. The model is so large that one layer of one
micro-batch takes some 25 ms: a device of its own computes while the next step is prepared, this one
does not, and in smaller models it shows that it shares caches and the interpreter with its links.
cpu: a checkpoint on the real disk, read by few rows (bound by the disk) and by many (bound by
compute). All figures are of steady decode sweeps: the prefill, the first decode and the last sweep
are left out. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_links import Flow, Sample, drop_caches, header, markdown, run_together
from make_random_model import Shape, write_model

from flexrun import LLM, FlexrunError, SamplingParams
from flexrun.engine import Engine
from flexrun.plan import SweepPlan
from flexrun.trace import write_trace
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.links import FileExtent, Link
from offload.tiers import Split
from offload.transfer import Transfer
from offload.transfer_engine import TransferEngine
from policy_search.policy import Policy

MOST_RATIO = 1.08
"""Target: a sweep's time over the busiest link's or compute's."""
LEAST_SPEEDUP = 1.7
"""Target: over --no-overlap where link and compute take the same time."""
LEAST_DISK_SHARE = 0.9
LEAST_COMPUTE_SHARE = 0.85
FACTORS = {"link-bound": 2.0, "balanced": 1.0, "compute-bound": 0.5}
"""Time on the link over compute time."""
MICRO_BATCHES = 4
CALIBRATION_RUNS = 3
"""Of compute alone, which the speeds of the links are derived from."""
LEFT_OUT = 3
"""Sweeps of a run that are not measured: prefill, first decode, last."""
ROOM = 768 * 2**20
"""Of the emulated device besides weights: KV cache and activations."""
CASES = {
    "host->device": Policy(weights=Split(host=100), kv_cache=Split(device=100)),
    "three links": Policy(weights=Split(disk=100), kv_cache=Split(host=100), attention="device"),
}
ALONE = Policy()
THREADS = (
    "that compute; default: emulated leaves one core to the links, which a real device would not "
    "take from compute either, and cpu takes all"
)


@dataclass(frozen=True)
class Measured:
    """The steady sweeps of one run."""

    seconds: list[float]
    link_bytes: dict[str, float]
    """Per sweep."""
    copy_seconds: float
    """Processor time of all link threads per sweep."""
    sweeps: int
    """All that there were."""
    tokens: list[list[int]]

    @property
    def sweep(self) -> float:
        return statistics.median(self.seconds)


def shaped(
    policy: Policy, rows: int, sweeps: int, micro_batches: int = MICRO_BATCHES
) -> dict[str, Any]:
    """`policy` with sweeps of `rows` sequences in equal micro-batches, as settings of `LLM`."""
    batch = Policy(
        weights=policy.weights,
        kv_cache=policy.kv_cache,
        attention=policy.attention,
        micro_batch_rows=-(-rows // micro_batches),
        num_micro_batches=micro_batches,
        max_rows=8 * rows,
        max_sequences=rows,
        # A sequence stays within one page, so that all sweeps move the same bytes.
        page_tokens=-(-(sweeps + LEFT_OUT + 5) // 16) * 16,
    )
    return {"policy": batch}


def lane_seconds() -> float:
    """Processor time that the threads of all links have used."""
    total = 0
    for thread in threading.enumerate():
        if thread.name.startswith("flexrun ") and "->" in thread.name:
            with contextlib.suppress(OSError):
                times = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
                total += int(times.split()[0])
    return total / 1e9


class Job:
    """A loaded model and the prompts that it completes again and again."""

    def __init__(self, model: Path, rows: int, sweeps: int, **settings: Any) -> None:
        self.llm = LLM(model, dtype="auto", **settings)
        engine = self.llm._engine
        assert isinstance(engine, Engine)
        self.engine = engine
        draw = random.Random(0)
        ids = range(3, engine.vocab_size)
        self.prompts = [draw.choices(ids, k=draw.randint(2, 5)) for _ in range(rows)]
        self.new_tokens = sweeps + LEFT_OUT
        self._speeds: dict[str, float] = {}
        self._plans: list[SweepPlan] = []
        self._marks: list[tuple[float, dict[str, dict[str, int]]]] = []
        self._watch()

    def _watch(self) -> None:
        """Note the plan of every sweep, and the counters at its start.

        The prefill has no speed limits: what it stores would still be on its way many sweeps later.
        """
        scheduler = self.engine._runtime.scheduler
        next_sweep = scheduler.next_sweep

        def noted(*_: object) -> SweepPlan:
            self._limit(self._speeds if self._plans else {})
            self._marks.append(self._mark())
            self._plans.append(next_sweep())
            return self._plans[-1]

        scheduler.next_sweep = noted  # type: ignore[method-assign]

    def _mark(self) -> tuple[float, dict[str, dict[str, int]]]:
        counters = self.engine._runtime.transfers.counters
        return lane_seconds(), {str(link): dict(each.bytes) for link, each in counters.items()}

    def run(self) -> Measured:
        """Complete the prompts once. Raises `SystemExit` where no sweep is a steady one."""
        self._plans.clear()
        self._marks.clear()
        params = SamplingParams(temperature=0, max_tokens=self.new_tokens, ignore_eos=True)
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in self.prompts]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        self.engine._runtime.transfers.drain()
        self._marks.append(self._mark())
        count = len(self._plans)
        decodes = [i for i, plan in enumerate(self._plans) if plan.rows == len(prompts)]
        decodes = [i for i in decodes if all(s.length == 1 for s in _spans(self._plans[i]))]
        steady = decodes[1:-1]
        if not steady or steady != list(range(steady[0], steady[-1] + 1)):
            sys.exit(f"error: {count} sweeps, none steady\nhint: raise --sweeps or lower --rows")
        first, last = self._marks[steady[0]], self._marks[steady[-1] + 1]
        return Measured(
            seconds=self.engine._counters.sweep_seconds[-count:][steady[0] : steady[-1] + 1],
            link_bytes={link: self._bytes(link, first[1], last[1], steady) for link in last[1]},
            copy_seconds=(last[0] - first[0]) / len(steady),
            sweeps=count,
            tokens=[list(output.outputs[0].token_ids) for output in outputs],
        )

    def _bytes(
        self,
        link: str,
        first: dict[str, dict[str, int]],
        last: dict[str, dict[str, int]],
        steady: list[int],
    ) -> float:
        """Per sweep. What travels across the ends of sweeps is shared out: every sweep has the same
        weights, and every row stores as many keys and values as any other.
        """
        begin, end = self._marks[0][1].get(link, {}), self._marks[-1][1][link]
        total = 0.0
        rows = [plan.rows for plan in self._plans]
        for kind in end:
            if kind in ("weights", "padding"):
                total += (end[kind] - begin.get(kind, 0)) / len(rows)
            elif link == Link.DEVICE_TO_HOST:
                total += (end[kind] - begin.get(kind, 0)) * rows[steady[0]] / sum(rows)
            else:
                total += (last[link].get(kind, 0) - first.get(link, {}).get(kind, 0)) / len(steady)
        return total

    def raw(self, seconds: float) -> Sample:
        """What the disk gives: the job's own reads, as many in flight, and nothing beside them."""
        runtime = self.engine._runtime
        link, pieces = runtime.weights.store.raw_copies()[0]
        transfers, last = TransferEngine(runtime.backend), dict[int, Transfer]()

        def start(number: int) -> Transfer:
            piece = pieces[number % len(pieces)]
            after = [last.get(piece.buffer)]
            transfer = transfers.submit(link, piece.source, piece.target, kind="raw", after=after)
            last[piece.buffer] = transfer
            return transfer

        try:
            sizes = [piece.source.nbytes for piece in pieces]
            return run_together([Flow(str(link), sizes, start, link, queued=6)], seconds)[0]
        finally:
            transfers.close()

    def limit(self, speeds: dict[str, float]) -> None:
        """From now on the emulated links have these speeds in sweeps that decode."""
        self._speeds = speeds

    def _limit(self, speeds: dict[str, float]) -> None:
        backend = self.engine._runtime.backend
        if isinstance(backend, EmulatedBackend):
            stated = {Link(name): speed for name, speed in speeds.items()}
            backend.machine = EmulatedMachine(backend.machine.capacity, stated)

    def trace(self, file: Path | None) -> None:
        """Write what was traced since the last call, if to a file."""
        if file is not None:
            timeline = self.engine._runtime.timeline
            write_trace(file, timeline.finish())
            timeline.intervals.clear()

    @property
    def direct(self) -> bool:
        """The disk is read past the page cache."""
        sources = [c.source for c in self.engine._runtime.weights.store.raw_copies()[0][1]]
        return all(each.file.direct for each in sources if isinstance(each, FileExtent))


def _spans(plan: SweepPlan) -> Iterator[Any]:
    return (span for batch in plan.micro_batches for span in batch.spans)


@contextlib.contextmanager
def jobs(*settings: dict[str, Any]) -> Iterator[list[Job]]:
    """Jobs that are loaded at the same time, and closed."""
    with contextlib.ExitStack() as stack:
        made = []
        for each in settings:
            made.append(Job(**each))
            stack.enter_context(made[-1].llm)
        yield made


class Emulated:
    """The cases with links of a stated speed."""

    def __init__(self, model: Path, given: argparse.Namespace, weight_bytes: int) -> None:
        self._given = given
        self._machine = f"capacity={weight_bytes + ROOM}"
        self._base = {"model": model, "rows": given.rows, "sweeps": given.sweeps}

    def _settings(self, policy: Policy, overlap: bool = True) -> dict[str, Any]:
        """Of a job."""
        given = self._given
        shape = shaped(policy, given.rows, given.sweeps)
        machine = {"device": "emulated", "emulate": self._machine, "overlap": overlap}
        return {**self._base, **shape, **machine}

    def run(self) -> dict[str, Any]:
        """Every case, and what they are held to."""
        report: dict[str, Any] = {"unlimited": [], "cases": []}
        with jobs(self._settings(ALONE)) as (alone,):
            for name, policy in CASES.items():
                kinds = self._kinds(name)
                if not kinds:
                    continue
                settings = [self._settings(policy, overlap) for overlap in (True, False)]
                with jobs(*settings) as (overlapped, stepwise):
                    for job in (alone, overlapped, stepwise):
                        job.run()  # warms up
                    free = overlapped.run()
                    compute = statistics.median(alone.run().sweep for _ in range(CALIBRATION_RUNS))
                    report["unlimited"].append(_unlimited(name, free, compute))
                    for kind, factor in kinds.items():
                        seconds = factor * compute
                        speeds = {link: n / seconds for link, n in free.link_bytes.items() if n}
                        pairs = self._pairs(overlapped, alone, stepwise, speeds)
                        case = {"case": name, "kind": kind, "factor": factor, "speeds": speeds}
                        overlapped.trace(self._trace_file(case))
                        report["cases"].append({**case, **judged(kind, pairs)})
                        ratios = " ".join(f"{pair['ratio']:.2f}" for pair in pairs)
                        print(f"{name}, {kind}: {ratios} of the bound", file=sys.stderr)
        return report

    def _kinds(self, case: str) -> dict[str, float]:
        only = self._given.only
        return {kind: f for kind, f in FACTORS.items() if only in f"{case}, {kind}"}

    def _trace_file(self, case: dict[str, Any]) -> Path | None:
        if self._given.trace is None:
            return None
        self._given.trace.mkdir(parents=True, exist_ok=True)
        name = f"{case['case']} {case['kind']}.json".replace(" ", "_").replace("->", "_to_")
        return Path(self._given.trace, name)

    def _pairs(
        self, overlapped: Job, alone: Job, stepwise: Job, speeds: dict[str, float]
    ) -> list[dict[str, Any]]:
        """One of each kind of run per repeat, in turn forwards and backwards.

        Compute alone comes before and after the overlapped run: other users of the machine make it
        faster and slower within a minute.
        """
        overlapped.engine._runtime.timeline.traced = self._given.trace is not None
        for job in (overlapped, stepwise):
            job.limit(speeds)
        pairs, order = [], [alone, overlapped, alone, stepwise]
        for repeat in range(self._given.repeats):
            runs: dict[Job, list[Measured]] = {job: [] for job in order}
            for job in order if repeat % 2 == 0 else order[::-1]:
                runs[job].append(job.run())
            pairs.append(_pair(runs[overlapped][0], runs[alone], runs[stepwise][0], speeds))
        return pairs


def _unlimited(name: str, free: Measured, compute: float) -> dict[str, Any]:
    return {
        "case": name,
        "sweep_seconds": free.sweep,
        "compute_alone_seconds": compute,
        "link_bytes": free.link_bytes,
        "copy_cpu_seconds": free.copy_seconds,
    }


def _pair(
    fast: Measured, alone: list[Measured], slow: Measured, speeds: dict[str, float]
) -> dict[str, Any]:
    links = {link: fast.link_bytes[link] / speed for link, speed in speeds.items()}
    compute = statistics.mean(run.sweep for run in alone)
    bound = max(*links.values(), compute)
    return {
        "sweep_seconds": fast.sweep,
        "compute_alone_seconds": compute,
        "no_overlap_seconds": slow.sweep,
        "link_bytes": fast.link_bytes,
        "link_seconds": links,
        "bound_seconds": bound,
        "ratio": fast.sweep / bound,
        "speedup": slow.sweep / fast.sweep,
        "copy_cpu_seconds": fast.copy_seconds,
        "identical": all(run.tokens == fast.tokens for run in (slow, *alone)),
    }


def judged(kind: str, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of a case's pairs, held against the targets."""
    names = ("sweep_seconds", "bound_seconds", "ratio", "speedup", "copy_cpu_seconds")
    medians = {name: statistics.median(pair[name] for pair in pairs) for name in names}
    met = {"ratio": medians["ratio"] <= MOST_RATIO}
    if kind == "balanced":
        met["speedup"] = medians["speedup"] >= LEAST_SPEEDUP
    identical = all(pair["identical"] for pair in pairs)
    return {**medians, "identical": identical, "met": met, "pairs": pairs}


def show_emulated(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = [
        [
            f"{case['case']}, {case['kind']}",
            *(f"{case[name]:.3f}" for name in ("sweep_seconds", "bound_seconds")),
            *(f"{case[name]:.2f}" for name in ("ratio", "speedup")),
            f"{case['copy_cpu_seconds']:.3f}",
            "yes" if case["identical"] else "NO",
            ", ".join(f"{name} {'met' if met else 'MISSED'}" for name, met in case["met"].items()),
        ]
        for case in report["cases"]
    ]
    names = ("case", "sweep, s", "bound, s", "ratio", "over no overlap", "CPU of copies, s")
    lines = [markdown((*names, "same tokens", "targets"), rows), ""]
    for free in report["unlimited"]:
        moved = ", ".join(f"{n / 1e6:.1f} MB {link}" for link, n in free["link_bytes"].items() if n)
        lines.append(
            f"{free['case']} at unlimited speed: {free['sweep_seconds']:.3f} s a sweep beside "
            f"{free['compute_alone_seconds']:.3f} s of compute alone; {moved}; copies took "
            f"{free['copy_cpu_seconds']:.3f} s of processor time"
        )
    lines.append(f"{report['compute_threads']} threads compute")
    lines.append(f"targets: ratio at most {MOST_RATIO}, speedup at least {LEAST_SPEEDUP}")
    return "\n".join(lines)


def run_cpu(given: argparse.Namespace) -> dict[str, Any]:
    """The real disk, by few rows and by many."""

    def settings(split: Split, rows: int) -> dict[str, Any]:
        base = {"model": given.model, "rows": rows, "sweeps": given.sweeps, "device": "cpu"}
        # One micro-batch: each reads all weights from memory, and reorders them for its products.
        return {**base, **shaped(Policy(weights=split), rows, given.sweeps, micro_batches=1)}

    disk, here = Split(disk=100), Split(device=100)
    report: dict[str, Any] = {"disk_bound": [], "compute_bound": []}
    with jobs(settings(disk, given.few_rows)) as (job,):
        report["direct_io"] = job.direct
        for _ in range(given.repeats):
            before, run, after = job.raw(given.seconds), job.run(), job.raw(given.seconds)
            report["disk_bound"].append(_disk_pair(before, run, after))
        report["raw_gb_per_s_at_load"] = {
            name: link["raw_gb_per_s"] for name, link in job.llm.summary()["links"].items()
        }
    with jobs(settings(disk, given.rows), settings(here, given.rows)) as both:
        for repeat in range(given.repeats):
            runs = {job: job.run() for job in (both if repeat % 2 == 0 else both[::-1])}
            report["compute_bound"].append(_compute_pair(*(runs[job] for job in both)))
    shares = {
        name: statistics.median(pair["share"] for pair in report[name])
        for name in ("disk_bound", "compute_bound")
    }
    met = {
        "disk_bound": shares["disk_bound"] >= LEAST_DISK_SHARE,
        "compute_bound": shares["compute_bound"] >= LEAST_COMPUTE_SHARE,
    }
    return {**report, "shares": shares, "met": met}


def _disk_pair(before: Sample, run: Measured, after: Sample) -> dict[str, Any]:
    nbytes, seconds = sum(run.link_bytes.values()), statistics.mean(run.seconds)
    raw = (before.bytes + after.bytes) / (before.seconds + after.seconds)
    return {
        "sweep_bytes": nbytes,
        "sweep_seconds": seconds,
        "gb_per_s": nbytes / seconds / 1e9,
        "raw_gb_per_s": raw / 1e9,
        "raw_before_gb_per_s": before.rate / 1e9,
        "raw_after_gb_per_s": after.rate / 1e9,
        "share": nbytes / seconds / raw,
        "copy_cpu_seconds": run.copy_seconds,
    }


def _compute_pair(disk: Measured, here: Measured) -> dict[str, Any]:
    return {
        "sweep_seconds": disk.sweep,
        "compute_alone_seconds": here.sweep,
        "share": here.sweep / disk.sweep,
        "sweep_bytes": sum(disk.link_bytes.values()),
        "copy_cpu_seconds": disk.copy_seconds,
        "identical": disk.tokens == here.tokens,
    }


def show_cpu(report: dict[str, Any], given: argparse.Namespace) -> str:
    """The report for people."""
    median = statistics.median
    disk, compute = report["disk_bound"], report["compute_bound"]
    reached, raw = (median(p[n] for p in disk) for n in ("gb_per_s", "raw_gb_per_s"))
    taken, alone = (
        median(p[n] for p in compute) for n in ("sweep_seconds", "compute_alone_seconds")
    )
    said = {name: "met" if met else "MISSED" for name, met in report["met"].items()}
    disk_time = median(p["sweep_bytes"] for p in compute) / 1e9 / raw
    rows = [
        [
            f"bound by the disk, {given.few_rows} rows",
            f"{reached:.3f} GB/s read",
            f"{raw:.3f} GB/s raw",
            f"{report['shares']['disk_bound']:.0%}",
            f"at least {LEAST_DISK_SHARE:.0%}: {said['disk_bound']}",
        ],
        [
            f"bound by compute, {given.rows} rows",
            f"{taken:.3f} s a sweep",
            f"{alone:.3f} s of compute alone (disk alone: {disk_time:.2f} s)",
            f"{report['shares']['compute_bound']:.0%}",
            f"at least {LEAST_COMPUTE_SHARE:.0%}: {said['compute_bound']}",
        ],
    ]
    lines = [markdown(("case", "reached", "limit", "share", "target"), rows), ""]
    if disk_time > alone / 2:
        lines.append(
            f"note: with {given.rows} rows the disk is nearly as slow as compute, and its threads "
            "take processor time; to see the case bound by compute, raise --rows"
        )
    same = all(pair["identical"] for pair in compute)
    return "\n".join([*lines, f"same tokens from disk and from memory: {'yes' if same else 'NO'}"])


def make_model(directory: Path, given: argparse.Namespace) -> int:
    """Write a random Llama in float32; its bytes."""
    hidden, heads = given.hidden, max(4, given.hidden // 64)
    shape = Shape(given.layers, hidden, heads, heads // 4, hidden * 11 // 4, 1024, 8192)
    directory.mkdir(parents=True)
    write_model(directory, shape, "float32", 0)
    return sum(path.stat().st_size for path in directory.iterdir())


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="emulated", choices=("emulated", "cpu"))
    add("--model", type=Path, metavar="DIR", help="of --device cpu; emulated makes its own")
    add("--directory", type=Path, default=Path(tempfile.gettempdir()), help="for that")
    add("--layers", type=int, default=24)
    add("--hidden", type=int, default=1024, help="a multiple of 256 (%(default)s)")
    add("--rows", type=int, default=256, help="sequences, and so rows of a sweep (%(default)s)")
    add("--few-rows", type=int, default=4, help="of the disk-bound case (%(default)s)")
    add("--sweeps", type=int, default=4, help="steady sweeps of one run (%(default)s)")
    add("--seconds", type=float, default=1.5, help="of one raw disk measurement (%(default)s)")
    add("--repeats", type=int, default=3)
    add("--only", default="", metavar="TEXT", help="emulated cases with this in their name")
    add("--threads", type=int, metavar="N", help=THREADS)
    add("--trace", type=Path, metavar="DIR", help="keep a trace of every overlapped run here")
    given = parser.parse_args()
    if given.device == "cpu" and given.model is None:
        parser.error("--device cpu reads a checkpoint from disk: name one with --model")
    if min(given.layers, given.hidden, given.sweeps, given.repeats, given.few_rows) < 1:
        parser.error("all counts must be at least 1: leave them out for the defaults")
    if given.rows < MICRO_BATCHES or given.hidden % 256:
        parser.error(f"--rows must be at least {MICRO_BATCHES}, --hidden a multiple of 256")
    return given


def main() -> None:
    """Run the benchmark."""
    given = read_arguments()
    cores = os.cpu_count() or 1
    threads = given.threads or (cores if given.device == "cpu" else max(1, cores - 1))
    torch.set_num_threads(threads)
    report = header(
        "overlap", given.model.absolute() if given.model else given.directory.absolute()
    )
    report |= {"device": given.device, "compute_threads": threads}
    try:
        if given.device == "cpu":
            report["cache"] = drop_caches()
            report |= run_cpu(given)
            print(show_cpu(report, given))
        else:
            given.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=given.directory) as directory:
                model = Path(directory, "model")
                weight_bytes = make_model(model, given)
                report["cache"] = drop_caches()
                report |= Emulated(model, given, weight_bytes).run()
            print(show_emulated(report))
    except FlexrunError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint or 'see --help'}")
    print(f"cache: {report['cache']}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
