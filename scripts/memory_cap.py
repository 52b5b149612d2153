"""Runs a command under a memory cap that counts the page cache, and says what it really used.

Without such a cap, a model larger than the memory it is said to run in is served by the page cache.
Where a memory control group can be made (as root, or a delegated one), the command runs in a child
group of this process's own. Elsewhere a watchdog kills the command when its processes hold more
than the limit; the page cache is then not capped, and the report says so. `--method hog` also locks
the rest of the machine's memory away, so that only the limit is left for command and page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

METHODS = ("auto", "cgroup", "watchdog", "hog")
PAGE = mmap.PAGESIZE
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class CapError(Exception):
    """What cannot be done, and what to do about it."""


@dataclass
class CappedRun:
    """What a command did under its cap."""

    method: str
    """How the limit was held."""
    counts_page_cache: bool
    limit_bytes: int
    exit_code: int = -1
    """The command's own; minus the signal's number if a signal ended it."""
    stopped: str | None = None
    """`limit` or `timeout` if that ended it."""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    """Of all the command's processes together, mapped files included; sampled."""
    peak_anonymous_bytes: int = 0
    """The part of it that is not mapped from files; sampled."""
    peak_cgroup_bytes: int | None = None
    """Page cache included, as the kernel counted it."""
    read_bytes: int = 0
    """What came from the disk itself and not from the page cache."""
    stdout: list[tuple[float, str]] = field(default_factory=list)
    """The captured lines, each with the time it arrived (`time.monotonic`)."""
    stderr: list[tuple[float, str]] = field(default_factory=list)
    reads: list[tuple[float, int]] = field(default_factory=list)
    """`read_bytes` over time."""

    def summary(self) -> dict[str, Any]:
        """The facts without the captured texts."""
        hidden = ("stdout", "stderr", "reads")
        return {name: value for name, value in asdict(self).items() if name not in hidden}


def parse_size(text: str) -> int:
    """Bytes of `1.5GiB`, `800MB` or `4096`. Raises `CapError`."""
    match = re.fullmatch(r"([0-9.]+)\s*(?:([KMGT])(i?)B?)?", text.strip(), re.IGNORECASE)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise CapError(f"{text!r} is not a size\nhint: write it like 1.5GiB or 800MB")
    base = 1024 if match[3] else 1000
    return int(number * base ** (" KMGT".index(match[2].upper()) if match[2] else 0))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(text: str, name: str) -> int:
    match = re.search(rf"^{name} (\d+)$", text, re.MULTILINE)
    return int(match[1]) if match else 0


class Cgroup:
    """A memory control group made for one command, version 1 or 2."""

    def __init__(self, path: Path, version: int) -> None:
        self.path, self.version = path, version

    @classmethod
    def create(cls, limit: int) -> Cgroup:
        """A group limited to `limit`, inside this process's own. Raises `CapError`."""
        reasons = []
        for parent, version in _cgroup_parents():
            _remove_stale(parent)
            group = cls(parent / f"memory-cap-{os.getpid()}-{time.monotonic_ns()}", version)
            try:
                group.path.mkdir()
                group._limit(limit)
                return group
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                group.remove()
        raise CapError(
            "no memory control group can be made here: "
            + ("; ".join(reasons) or "no memory controller is mounted")
            + "\nhint: run as root, or inside `systemd-run --user --scope -p Delegate=yes`, or "
            "choose --method watchdog or hog"
        )

    def _limit(self, limit: int) -> None:
        if self.version == 2:
            (self.path / "memory.max").write_text(str(limit))
            swap, value = self.path / "memory.swap.max", "0"
        else:
            (self.path / "memory.limit_in_bytes").write_text(str(limit))
            swap, value = self.path / "memory.memsw.limit_in_bytes", str(limit)
        with contextlib.suppress(OSError):  # a kernel without swap accounting
            swap.write_text(value)

    def pids(self) -> list[int]:
        """The processes inside."""
        return [int(line) for line in _read(self.path / "cgroup.procs").split()]

    @property
    def peak_bytes(self) -> int | None:
        """The most it held, page cache included; None where the kernel does not say."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        text = _read(self.path / name).strip()
        return int(text) if text else None

    @property
    def kills(self) -> int:
        """How many processes the kernel killed for the limit."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        return _number(_read(self.path / name), "oom_kill")

    def remove(self) -> None:
        """Kill what is left inside and remove the group."""
        for _ in range(100):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.path.rmdir()
            if not self.path.exists():
                return
            time.sleep(0.05)
        print(f"note: {self.path} could not be removed", file=sys.stderr)


def _remove_stale(parent: Path) -> None:
    """Remove the empty groups of processes that were killed before they could do so."""
    for path in parent.glob("memory-cap-*"):
        if not Path("/proc", path.name.split("-")[2]).exists():
            with contextlib.suppress(OSError):
                path.rmdir()


def _cgroup_parents() -> Iterator[tuple[Path, int]]:
    """Groups in which one with a memory limit may be made: this process's own, then those above."""
    own = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in _read_own_groups()}
    for line in _read(Path("/proc/self/mounts")).splitlines():
        _, mount, kind, options = line.split()[:4]
        if kind == "cgroup" and "memory" in options.split(","):
            path = next((p for names, p in own.items() if "memory" in names.split(",")), None)
            if path is not None and (group := Path(mount + path)).is_dir():
                yield group, 1
        elif kind == "cgroup2" and "" in own:
            group = Path(mount + own[""])
            for parent in (group, *group.parents):
                if "memory" in _read(parent / "cgroup.subtree_control").split():
                    yield parent, 2
                if parent == Path(mount):
                    break


def _read_own_groups() -> list[str]:
    return _read(Path("/proc/self/cgroup")).splitlines()


def process_tree(root: int) -> list[int]:
    """`root` and its descendants."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            waiting.extend(int(child) for child in _read(task).split())
    return found


class Sampler(threading.Thread):
    """Looks at a command's processes every `interval` seconds until it is stopped."""

    def __init__(
        self,
        pids: Callable[[], list[int]],
        run: CappedRun,
        interval: float,
        over: Callable[[], None],
    ) -> None:
        super().__init__(daemon=True)
        self._pids, self._run, self._interval, self._over = pids, run, interval, over
        self._stopping = threading.Event()
        self._read_by: dict[int, int] = {}

    def run(self) -> None:
        while not self._stopping.wait(self._interval):
            self._sample()

    def stop(self) -> None:
        """Stop looking."""
        self._stopping.set()
        self.join()

    def _sample(self) -> None:
        resident = anonymous = 0
        for pid in self._pids():
            numbers = _read(Path(f"/proc/{pid}/statm")).split()
            if len(numbers) < 3:
                continue
            resident += int(numbers[1]) * PAGE
            anonymous += (int(numbers[1]) - int(numbers[2])) * PAGE
            self._read_by[pid] = max(self._read_by.get(pid, 0), _bytes_read(pid))
        run = self._run
        run.peak_rss_bytes = max(run.peak_rss_bytes, resident)
        run.peak_anonymous_bytes = max(run.peak_anonymous_bytes, anonymous)
        run.reads.append((time.monotonic(), sum(self._read_by.values())))
        # Mapped files are page cache, which a kernel takes back: they are not the command's fault.
        if anonymous > run.limit_bytes:
            self._over()


def _bytes_read(pid: int) -> int:
    return (
        int(m[1]) if (m := re.search(r"read_bytes: (\d+)", _read(Path(f"/proc/{pid}/io")))) else 0
    )


def _hog(limit: int) -> subprocess.Popen[str]:
    """A process that locks all free memory but `limit`. Raises `CapError`."""
    code = (
        "import ctypes, mmap, sys\n"
        "size = int(sys.argv[1])\n"
        "open('/proc/self/oom_score_adj', 'w').write('1000')\n"
        "area = mmap.mmap(-1, size)\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(area))\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "done = libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size))\n"
        "print('locked' if done == 0 else f'errno {ctypes.get_errno()}', flush=True)\n"
        "sys.stdin.read()\n"
    )
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    size = (int(match[1]) * 1024 if match else 0) - limit
    if size <= 0:
        raise CapError("less memory is free than the limit\nhint: lower --limit")
    command = [sys.executable, "-c", code, str(size)]
    hog = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_die_with_parent,
    )
    assert hog.stdout is not None
    answer = hog.stdout.readline().strip()
    if answer != "locked":
        hog.kill()
        hog.wait()
        raise CapError(
            f"{size} bytes cannot be locked ({answer or 'killed'})\n"
            "hint: run as root, raise `ulimit -l`, or choose --method watchdog"
        )
    return hog


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _enter(group: Cgroup | None) -> Callable[[], None]:
    """What the child does before it becomes the command."""
    path = os.fsencode(group.path / "cgroup.procs") if group else None

    def enter() -> None:
        _die_with_parent()
        if path is not None:
            descriptor = os.open(path, os.O_WRONLY)
            os.write(descriptor, b"0")  # 0 stands for the process that writes
            os.close(descriptor)

    return enter


def _collect(stream: IO[str], lines: list[tuple[float, str]]) -> threading.Thread:
    def collect() -> None:
        with contextlib.suppress(ValueError):
            for line in stream:
                lines.append((time.monotonic(), line.rstrip("\n")))

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    return thread


def choose_method(method: str, limit: int) -> tuple[str, Cgroup | None]:
    """The method that is used, and its control group if it is one. Raises `CapError`."""
    if method not in ("auto", "cgroup"):
        return method, None
    try:
        group = Cgroup.create(limit)
        return f"cgroup v{group.version}", group
    except CapError as error:
        if method == "cgroup":
            raise
        print(f"note: {error}", file=sys.stderr)
        return "watchdog", None


def run_capped(
    command: Sequence[str],
    limit: int,
    *,
    method: str = "auto",
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    capture: bool = False,
    interval: float = 0.1,
) -> CappedRun:
    """Run `command` with at most `limit` bytes. Raises `CapError` if it cannot be started.

    All of its processes are gone when this returns, whatever happened.
    """
    used, group = choose_method(method, limit)
    with contextlib.ExitStack() as stack:
        if group is not None:
            stack.callback(group.remove)
        if used == "hog":
            hog = _hog(limit)
            stack.callback(hog.wait)
            stack.callback(hog.kill)
        run = CappedRun(used, used != "watchdog", limit)
        pipe = subprocess.PIPE if capture else None
        try:
            child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL if capture else None,
                stdout=pipe,
                stderr=pipe,
                text=True,
                errors="replace",
                env=environment,
                start_new_session=True,
                preexec_fn=_enter(group),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise CapError(f"{command[0]} cannot be run: {error}") from None
        stack.callback(_end, child, group)
        _attend(child, run, group, timeout, interval)
    return run


def _attend(
    child: subprocess.Popen[str],
    run: CappedRun,
    group: Cgroup | None,
    timeout: float | None,
    interval: float,
) -> None:
    """Watch the child until it ends, or end it."""
    start = time.monotonic()

    def over() -> None:
        if group is None:  # otherwise the kernel sees to it
            run.stopped = "limit"
            _kill(child, group)

    readers = []
    if child.stdout is not None and child.stderr is not None:
        readers = [_collect(child.stdout, run.stdout), _collect(child.stderr, run.stderr)]
    pids = group.pids if group is not None else lambda: process_tree(child.pid)
    sampler = Sampler(pids, run, interval, over)
    sampler.start()
    timer = threading.Timer(timeout or 0, _end_for_time, (child, group, run))
    if timeout is not None:
        timer.start()
    try:
        _, status, usage = os.wait4(child.pid, 0)
    finally:
        timer.cancel()
        sampler.stop()
    child.returncode = run.exit_code = os.waitstatus_to_exitcode(status)
    run.seconds = time.monotonic() - start
    sampled = run.reads[-1][1] if run.reads else 0
    run.read_bytes = max(512 * usage.ru_inblock, sampled)
    if group is not None:
        run.peak_cgroup_bytes = group.peak_bytes
        if run.stopped is None and group.kills and run.exit_code != 0:
            run.stopped = "limit"
    _kill(child, group)  # what the command left behind, which would keep its output open
    for reader in readers:
        reader.join(timeout=10)


def _end_for_time(child: subprocess.Popen[str], group: Cgroup | None, run: CappedRun) -> None:
    run.stopped = "timeout"
    _kill(child, group)


def _kill(child: subprocess.Popen[str], group: Cgroup | None) -> None:
    """Kill the command's processes, if there are any left."""
    if group is not None:
        pids = group.pids()
    else:
        pids = process_tree(child.pid) if child.returncode is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    for each in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _end(child: subprocess.Popen[str], group: Cgroup | None) -> None:
    """Whatever happened, nothing of the command is left after this."""
    _kill(child, group)
    if child.returncode is None:
        child.wait()
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()


def report(run: CappedRun) -> str:
    """One line for people."""
    peak = (
        "" if run.peak_cgroup_bytes is None else f", with page cache {_mib(run.peak_cgroup_bytes)}"
    )
    cache = "" if run.counts_page_cache else " (the page cache is NOT capped)"
    ended = f"stopped by the {run.stopped}" if run.stopped else f"exit code {run.exit_code}"
    return (
        f"memory_cap: {run.method}{cache}, limit {_mib(run.limit_bytes)}, peak RSS "
        f"{_mib(run.peak_rss_bytes)}{peak}, read {_mib(run.read_bytes)} from disk, "
        f"{run.seconds:.1f} s, {ended}"
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """All or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(value, file)
    os.replace(file.name, path)


def main() -> int:
    """Runs the command; its exit code, or 128 + the signal's number."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="%(prog)s --limit SIZE [options] -- COMMAND ...",
    )
    parser.add_argument("--limit", required=True, metavar="SIZE", help="such as 1.5GiB")
    parser.add_argument("--method", choices=METHODS, default="auto")
    parser.add_argument("--timeout", type=float, metavar="SECONDS")
    parser.add_argument("--interval", type=float, default=0.1, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the facts there")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    given = parser.parse_args()
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("no command given; write it after --")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        limit = parse_size(given.limit)
        run = run_capped(
            command, limit, method=given.method, timeout=given.timeout, interval=given.interval
        )
    except CapError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(report(run), file=sys.stderr)
    if given.json is not None:
        _write_json(given.json, run.summary())
    return run.exit_code if run.exit_code >= 0 else 128 - run.exit_code


if __name__ == "__main__":
    sys.exit(main())
