"""Speed of every link of this machine, alone and all together, through the transfer engine itself.

What is measured is what a job can have: the engine's queues and threads, the backend's copies, the
pinned slabs and O_DIRECT. The first read of a fresh file is not timed, for virtual disks are slow
at it. With --device emulated it checks that the stated speeds are reached (exit code 1 if not). The
last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers

from flexrun import FlexrunError
from flexrun.config import EngineConfig
from flexrun.machine import open_backend
from offload.backend import DeviceBackend, copy_bytes
from offload.backend_emulated import EmulatedBackend
from offload.direct_file import DirectFile
from offload.links import FileExtent, Link
from offload.ram import map_memory
from offload.staging import StagingBuffers
from offload.tiers import REQUEST_BYTES, STAGING_BUFFERS, Tier, format_size, parse_size
from offload.transfer import Transfer
from offload.transfer_engine import TransferEngine

EMULATED = "host-to-device=1GB/s,device-to-host=1GB/s,disk-read=400MB/s,disk-write=200MB/s"
QUEUED = 3
"""Copies that are queued or under way, so that a link never waits for the next one."""
REACHED = 0.95
"""Share of a stated speed that counts as reached."""
RAM = "RAM->RAM"
RELAY = "disk->host->device"


@dataclass(frozen=True)
class Sample:
    """What one run moved, and how long that took."""

    bytes: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.bytes / self.seconds


@dataclass(frozen=True)
class Flow:
    """Copies between the same places, again and again."""

    name: str
    sizes: Sequence[int]
    """Bytes of the copies, in turn."""
    start: Callable[[int], Transfer | None]
    """Queue copy number `i`; None if it is over already."""
    link: Link | None = None
    queued: int = QUEUED
    pieces: int | None = None
    """Exactly so many; None: as many as the time allows."""
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None

    def run(self, seconds: float, gate: threading.Barrier) -> Sample:
        """Copy for `seconds`, from when all that share `gate` are ready."""
        self.before()
        if self.pieces is None:  # the first copy finds everything cold
            _finish(self.start(0))
        gate.wait()
        begin, number = time.perf_counter(), 0
        waiting: deque[Transfer | None] = deque()
        while self._goes_on(number, time.perf_counter() - begin, seconds):
            waiting.append(self.start(number))
            number += 1
            if len(waiting) >= self.queued:
                _finish(waiting.popleft())
        for transfer in waiting:
            _finish(transfer)
        self.after()
        seconds = time.perf_counter() - begin
        return Sample(sum(self.sizes[i % len(self.sizes)] for i in range(number)), seconds)

    def _goes_on(self, number: int, passed: float, seconds: float) -> bool:
        return passed < seconds if self.pieces is None else number < self.pieces


def _finish(transfer: Transfer | None) -> None:
    if transfer is not None:
        transfer.synchronize()


def run_together(flows: Sequence[Flow], seconds: float) -> list[Sample]:
    """All flows at the same time."""
    gate = threading.Barrier(len(flows))
    with ThreadPoolExecutor(len(flows)) as pool:
        return list(pool.map(lambda flow: flow.run(seconds, gate), flows))


class Bench:
    """A backend with its transfer engine, a file to read, a file to write, and buffers."""

    def __init__(self, backend: DeviceBackend, directory: Path, nbytes: int) -> None:
        self.backend = backend
        self.transfers = TransferEngine(backend)
        self.piece = min(8 * REQUEST_BYTES, nbytes)
        self.nbytes = nbytes // self.piece * self.piece
        self.paths = [directory / "read", directory / "write"]
        self.written = DirectFile.create(self.paths[1], self.nbytes)
        with contextlib.closing(DirectFile.create(self.paths[0], self.nbytes)) as file:
            for each in (file, self.written):
                self._fill(each)
        self.read = DirectFile.open(self.paths[0])
        for start in range(0, self.nbytes, self.piece):  # the slow first time
            self.read.read(start, map_memory(self.piece))
        if not backend.unified:
            staging = backend.allocate(Tier.HOST, STAGING_BUFFERS * REQUEST_BYTES, "staging")
            self.transfers.use_staging(StagingBuffers(list(staging.split(REQUEST_BYTES)), backend))

    def _fill(self, file: DirectFile) -> None:
        block, draw = map_memory(REQUEST_BYTES), np.random.Generator(np.random.SFC64(0))
        for start in range(0, self.nbytes, REQUEST_BYTES):
            nbytes = min(REQUEST_BYTES, self.nbytes - start)
            block[:nbytes] = torch.frombuffer(bytearray(draw.bytes(nbytes)), dtype=torch.uint8)
            file.write(start, block[:nbytes])
        file.sync()

    def _on(self, tier: Tier) -> torch.Tensor:
        return self.backend.allocate(tier, self.piece, "a benchmark").fill_(1)

    def _extent(self, file: DirectFile, number: int, nbytes: int) -> FileExtent:
        return FileExtent(file, number % (self.nbytes // nbytes) * nbytes, nbytes)

    def _load(self, link: Link, one: bool) -> tuple[int, int]:
        """Copies that are queued at a time, and the bytes of each."""
        return (
            (1, min(self.backend.request_bytes(link), self.piece)) if one else (QUEUED, self.piece)
        )

    def disk_read(self, name: str = "", one: bool = False, relayed: bool = False) -> Flow:
        """Reads of consecutive pieces, over and over; `one`: a single request at a time."""
        link = self.backend.disk_in
        queued, nbytes = self._load(link, one)
        tier = Tier.DEVICE if relayed or self.backend.unified else Tier.HOST
        targets = [self._on(tier)[:nbytes] for _ in range(queued)]

        def start(number: int) -> Transfer:
            extent, target = self._extent(self.read, number, nbytes), targets[number % queued]
            if relayed:
                return self.transfers.submit_from_disk([(extent, target)], kind="raw")
            return self.transfers.submit(link, extent, target, kind="raw")

        return Flow(name or str(link), [nbytes], start, link, queued)

    def disk_write(self, name: str = "", one: bool = False) -> Flow:
        """Writes over blocks that the file has."""
        link, source = Link.HOST_TO_DISK, self._on(Tier.HOST)
        queued, nbytes = self._load(link, one)

        def start(number: int) -> Transfer:
            extent = self._extent(self.written, number, nbytes)
            return self.transfers.submit(link, source[:nbytes], extent, kind="raw")

        return Flow(name or str(link), [nbytes], start, link, queued)

    def buffered(self, read: bool) -> Flow:
        """The same through the page cache, once over a file that is not in it."""
        path = self.paths[0 if read else 1]
        file = DirectFile.open(path) if read else self.written
        buffers = [self._on(Tier.HOST) for _ in range(QUEUED)]
        link = self.backend.disk_in if read else Link.HOST_TO_DISK

        def start(number: int) -> Transfer:
            extent, buffer = self._extent(file, number, self.piece), buffers[number % QUEUED]
            ends = (extent, buffer) if read else (buffer, extent)
            return self.transfers.submit(link, *ends, kind="raw")

        def before() -> None:
            forget(path)
            file.direct = False

        def after() -> None:
            if not read:
                file.sync()
            file.direct = True

        pieces = self.nbytes // self.piece
        name = f"{link}, page cache"
        return Flow(name, [self.piece], start, link, QUEUED, pieces, before, after)

    def to_and_from(self, link: Link, pinned: bool = True) -> Flow:
        """Between HOST and DEVICE."""
        host, device = self._on(Tier.HOST), self._on(Tier.DEVICE)
        if not pinned:
            host = map_memory(self.piece).fill_(1)
        ends = (host, device) if link is Link.HOST_TO_DEVICE else (device, host)
        name = str(link) if pinned else f"{link}, not pinned"
        return Flow(
            name, [self.piece], lambda _: self.transfers.submit(link, *ends, kind="raw"), link
        )

    def memory(self) -> Flow:
        """The engine's RAM to RAM copy in one thread."""
        source, target = map_memory(self.piece).fill_(1), map_memory(self.piece).fill_(1)
        return Flow(RAM, [self.piece], lambda _: copy_bytes(source, target), queued=1)

    def close(self) -> None:
        """End the threads and close the files."""
        self.transfers.close()
        self.read.close()
        self.written.close()


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drop_caches() -> str:
    """Empty the page cache if we may; what was done."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return "the page cache was left as it was (not root); O_DIRECT goes past it"
    return "the page cache was dropped before; O_DIRECT goes past it"


def idle_check() -> dict[str, float]:
    """What others do to this machine while we do nothing; warns if that is not nothing."""
    load, times = os.getloadavg()[0], psutil.cpu_times_percent(interval=1.0)
    stolen = float(getattr(times, "steal", 0.0)) / 100
    used = 1 - float(times.idle + getattr(times, "iowait", 0.0)) / 100
    print(
        f"before the start: load average {load:.2f}, {used:.0%} of the processors used by others "
        f"or stolen ({stolen:.0%} stolen)",
        file=sys.stderr,
    )
    if load > 0.5 or used > 0.05:
        print("warning: the machine is not idle, so the figures are too low", file=sys.stderr)
    return {"load_average": load, "used_share": round(used, 4), "stolen_share": round(stolen, 4)}


def describe_machine(directory: Path) -> dict[str, Any]:
    """The hardware and the versions that decide what the numbers mean."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [row.partition(":")[2].strip() for row in text.splitlines() if "model name" in row]
    mounts = [m for m in psutil.disk_partitions(all=True) if directory.is_relative_to(m.mountpoint)]
    mount = max(mounts, key=lambda m: len(m.mountpoint), default=None)
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "gpu": None if gpu is None else f"{gpu.name}, {format_size(gpu.total_memory)}",
        "disk": None if mount is None else f"{mount.device} ({mount.fstype})",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }


def header(benchmark: str, directory: Path) -> dict[str, Any]:
    """The first entries of a benchmark's JSON object."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "benchmark": benchmark,
        "command": f"python scripts/{shlex.join(command)}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(directory),
        "before": idle_check(),
    }


def markdown(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def flows_of(bench: Bench) -> tuple[list[Flow], list[Flow], list[list[Flow]]]:
    """Flows that also run all together, flows that run alone only, and pairs that run as such."""
    write, memory = bench.disk_write(), bench.memory()
    single = [bench.disk_read(f"{bench.backend.disk_in}, 1 request in flight", one=True)]
    single += [bench.disk_write(f"{Link.HOST_TO_DISK}, 1 request in flight", one=True)]
    single += [bench.buffered(read=True), bench.buffered(read=False)]
    if bench.backend.unified:
        return [bench.disk_read(), write, memory], single, []
    into, out = (bench.to_and_from(link) for link in (Link.HOST_TO_DEVICE, Link.DEVICE_TO_HOST))
    single = [bench.disk_read(), memory, *single]
    if bench.backend.name == "cuda":
        single += [
            bench.to_and_from(link, pinned=False)
            for link in (Link.HOST_TO_DEVICE, Link.DEVICE_TO_HOST)
        ]
    return [bench.disk_read(RELAY, relayed=True), into, out, write], single, [[into, out]]


def measure(bench: Bench, seconds: float, repeats: int) -> list[dict[str, Any]]:
    """A row for every flow, and for every flow of a pair: alone, and beside the others."""
    together, single, pairs = flows_of(bench)
    groups = [[flow] for flow in (*together, *single)] + pairs + [together]
    samples: list[list[list[Sample]]] = [[] for _ in groups]
    for repeat in range(repeats):
        for number, group in enumerate(groups):
            samples[number].append(run_together(group, seconds))
        print(f"repeat {repeat + 1} of {repeats} done", file=sys.stderr)
    alone = {g[0].name: [s[0] for s in runs] for g, runs in zip(groups, samples) if len(g) == 1}
    rows = [_row(flow, alone[flow.name], None, "") for flow in single]
    for group, runs in zip(groups, samples):
        if len(group) > 1:
            what = "all" if group is together else "both directions"
            for place, flow in enumerate(group):
                rows.append(_row(flow, alone[flow.name], [run[place] for run in runs], what))
    return rows[len(single) :] + rows[: len(single)]


def _row(flow: Flow, alone: list[Sample], beside: list[Sample] | None, what: str) -> dict[str, Any]:
    rates = [
        None if samples is None else statistics.median(s.rate for s in samples)
        for samples in (alone, beside)
    ]
    assert rates[0] is not None
    return {
        "link": flow.name,
        "alone_gb_per_s": rates[0] / 1e9,
        "together_gb_per_s": None if rates[1] is None else rates[1] / 1e9,
        "together_with": what or None,
        "share_kept": None if rates[1] is None else rates[1] / rates[0],
        "alone": [asdict(sample) for sample in alone],
        "together": [asdict(sample) for sample in beside or []],
    }


def add_stated(rows: list[dict[str, Any]], backend: DeviceBackend) -> bool:
    """Note the stated speed of each link that has one; whether all of them are reached."""
    speeds = backend.machine.speeds if isinstance(backend, EmulatedBackend) else {}
    stated = {str(link): speed / 1e9 for link, speed in speeds.items()}
    for row in rows:
        row["stated_gb_per_s"] = speed = stated.get(row["link"])
        row["reached"] = None if speed is None else row["alone_gb_per_s"] >= REACHED * speed
    return all(row["reached"] is not False for row in rows)


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = []
    for row in rows:
        name = row["link"] + (f" (with {row['together_with']})" if row["together_with"] else "")
        both, share = row["together_gb_per_s"], row["share_kept"]
        line = [name, f"{row['alone_gb_per_s']:.2f}"]
        line += ["" if both is None else f"{both:.2f}", "" if share is None else f"{share:.0%}"]
        if row["stated_gb_per_s"] is not None:
            line[1] += f" of {row['stated_gb_per_s']:.2f} stated"
        lines.append(line)
    return markdown(("link", "alone, GB/s", "together, GB/s", "share kept"), lines)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "emulated"))
    parser.add_argument("--emulate", metavar="TEXT", help=f"stated speeds (default {EMULATED})")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--size", default="1GiB", help="of each of two test files (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of one run (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    given.directory = given.directory.absolute()
    if given.device == "emulated" and given.emulate is None:
        given.emulate = EMULATED
    if given.repeats < 1 or given.seconds <= 0:
        parser.error("--repeats and --seconds must be positive: leave them out for the defaults")
    try:
        given.size = parse_size(given.size)
    except FlexrunError as error:
        parser.error(f"--size: {error.message}; {error.hint}")
    return given


@contextlib.contextmanager
def test_directory(parent: Path, nbytes: int) -> Iterator[Path]:
    """A directory of our own with room for two files; gone afterwards. Raises `SystemExit`."""
    if not parent.is_dir():
        sys.exit(f"error: {parent} is not a directory\nhint: name another one with --directory")
    free = shutil.disk_usage(parent).free
    if 2 * nbytes > free or nbytes < REQUEST_BYTES:
        sys.exit(
            f"error: two test files of {format_size(nbytes)} in {parent}, where "
            f"{format_size(free)} are free\nhint: give --size at least "
            f"{format_size(REQUEST_BYTES)} and at most half of that, or another --directory"
        )
    with tempfile.TemporaryDirectory(prefix="flexrun-links-", dir=parent) as directory:
        yield Path(directory)


def main() -> int:
    """Run the benchmark; 1 if an emulated link does not reach its stated speed."""
    given = read_arguments()
    try:
        with (
            test_directory(given.directory, given.size) as directory,
            contextlib.ExitStack() as stack,
        ):
            report = header("links", given.directory)
            config = EngineConfig(model="", device=given.device, emulate=given.emulate)
            backend = open_backend(config)
            stack.callback(backend.close)
            bench = Bench(backend, directory, given.size)
            stack.callback(bench.close)
            report["cache"] = drop_caches()
            rows = measure(bench, given.seconds, given.repeats)
            direct = bench.read.direct and bench.written.direct
            reached = add_stated(rows, backend)
    except FlexrunError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint or 'see --help'}")
    report |= {
        "device": backend.name,
        "direct_io": direct,
        "file_bytes": bench.nbytes,
        "request_bytes": {str(k): backend.request_bytes(k) for k in backend.links},
        "requests_in_flight": {str(k): backend.requests_in_flight(k) for k in backend.links},
        "repeats": given.repeats,
        "stated_reached": reached if backend.name == "emulated" else None,
        "rows": rows,
    }
    print(show(rows))
    print(f"\ncache: {report['cache']}; both files were written and read once before")
    print(json.dumps(report))
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
