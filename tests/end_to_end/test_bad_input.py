"""What the command says and leaves behind when something is wrong.

What is killed, or short of disk, is a process of its own.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flexrun import cli
from flexrun.executor import Executor
from tests.end_to_end.reference import ragged_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
GENERATE = [sys.executable, "-m", "flexrun", "generate"]
PREPARE = ["--weights", "disk=100", "--dtype", "float16"]
"""The checkpoint is in float32: its weights are written to the offload directory first."""
SLOW_DISK = ["--device", "emulated", "--emulate", "disk-read=20MB/s", "--weights", "disk=100"]


class Job:
    """A job of 24 prompts in a directory of its own."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory, self.model = directory, model
        self.input = directory / "in.jsonl"
        self.output = directory / "out.jsonl"
        self.offload = directory / "offload"
        prompts = ragged_prompts(24, longest=7)
        self.input.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))

    def command(self, *flags: str) -> list[str]:
        files = ["--model", self.model, "--input", self.input, "--output", self.output]
        fixed = ["--dtype", "float32", "--max-tokens", "12", "--max-sequences", "6"]
        fixed += ["--offload-dir", str(self.offload)]
        return [*GENERATE, *map(str, files), *fixed, *flags]

    def run(
        self, *flags: str, limit_blocks: int | None = None, fault: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; `limit_blocks` of 512 bytes is the largest file that can be written.

        The Python code `fault` runs first in the process.
        """
        command = self.command(*flags)
        if limit_blocks is not None:
            shell = f"ulimit -f {limit_blocks}"
            command = ["/bin/sh", "-c", f'{shell} && exec "$@"', "sh", *command]
        environment = ENVIRONMENT
        if fault:
            (self.directory / "fault").mkdir(exist_ok=True)
            (self.directory / "fault" / "sitecustomize.py").write_text(fault)
            path = f"{self.directory / 'fault'}:{ROOT}"
            environment = ENVIRONMENT | {"PYTHONPATH": path}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    def run_here(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """The same in this process: most of a short run is the import of libraries."""
        stdout, stderr = io.StringIO(), io.StringIO()
        words = self.command(*flags)[len(GENERATE) - 1 :]
        with redirect_stdout(stdout), redirect_stderr(stderr):
            code = cli.main(words)
        return subprocess.CompletedProcess(words, code, stdout.getvalue(), stderr.getvalue())

    def run_disturbed(
        self, results: int, disturb: Callable[[], object], *flags: str
    ) -> subprocess.CompletedProcess[str]:
        """`run_here` beside a thread that disturbs it when this many results are written."""
        finished = threading.Event()

        def wait_and_disturb() -> None:
            while not self.output.exists() or len(self.lines()) < results:
                if finished.wait(0.01):
                    return
            disturb()

        thread = threading.Thread(target=wait_and_disturb)
        thread.start()
        try:
            return self.run_here(*flags)
        finally:
            finished.set()
            thread.join()

    def start_until(self, results: int, *flags: str) -> subprocess.Popen[str]:
        """A running process that has written this many results and is not done yet."""
        process = subprocess.Popen(
            self.command(*flags),
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while process.poll() is None and (not self.output.exists() or len(self.lines()) < results):
            time.sleep(0.01)
        return process

    def stores(self) -> list[str]:
        """What the offload directory has: prepared stores, and parts of them."""
        return sorted(path.name for path in self.offload.glob("flexrun-prepared/*"))

    def lines(self) -> list[bytes]:
        return self.output.read_bytes().splitlines(keepends=True)

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines()]


@pytest.fixture
def job(tmp_path, tiny_llama_dir) -> Job:
    return Job(tmp_path, tiny_llama_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_llama_dir) -> list[bytes]:
    """The lines that an undisturbed run writes, by index."""
    job = Job(tmp_path_factory.mktemp("whole"), tiny_llama_dir)
    done = job.run_here("--device", "cpu")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["requests"], summary["failed"], summary["skipped"]) == (24, 0, 0)
    return by_index(job.lines())


@pytest.fixture(scope="module")
def whole_float16(tmp_path_factory, tiny_llama_dir) -> list[bytes]:
    """The lines of a run with weights rounded to float16 in memory."""
    job = Job(tmp_path_factory.mktemp("whole16"), tiny_llama_dir)
    done = job.run_here("--device", "cpu", "--dtype", "float16", "--weights", "device=100")
    assert done.returncode == 0, done.stderr
    return by_index(job.lines())


def by_index(lines: list[bytes]) -> list[bytes]:
    return sorted(lines, key=lambda line: json.loads(line)["index"])


def copied_model(job: Job) -> Path:
    """The model in a place where a test may damage it; returns its weights."""
    job.model = shutil.copytree(job.model, job.directory / "model")
    return job.model / "model.safetensors"


def assert_refused(job: Job, done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, a message without a traceback, nothing on stdout, no output file."""
    assert done.returncode == 2, done.stderr
    assert "flexrun: error: " in done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not job.output.exists()


def test_a_missing_model(job):
    """A directory that does not exist is named."""
    job.model = job.directory / "no" / "model"
    assert_refused(job, job.run_here(), "there is no model at", str(job.model))


def test_truncated_weights(job):
    """A safetensors file that ends too early is named, before any sweep."""
    weights = copied_model(job)
    os.truncate(weights, weights.stat().st_size - 1000)
    assert_refused(job, job.run_here(), str(weights), "truncated")


def test_a_corrupt_header(job):
    """A safetensors file whose header is not JSON is named."""
    weights = copied_model(job)
    with weights.open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 40)
    assert_refused(job, job.run_here(), str(weights), "header")


@pytest.mark.parametrize(
    ("tier", "flags"),
    [
        ("device", ["--device", "emulated", "--emulate", "capacity=400KiB"]),
        ("host", ["--device", "emulated", "--weights", "host=100", "--host-memory", "300KiB"]),
        ("disk", ["--device", "cpu", *PREPARE, "--disk-space", "300KiB"]),
    ],
)
def test_a_budget_that_is_too_small(job, tier, flags):
    """A model that does not fit is refused with what is missing, where, and the flag that helps."""
    flag = {"device": "--device-memory", "host": "--host-memory", "disk": "--disk-space"}[tier]
    done = job.run_here(
        *flags, "--micro-batch", "16", "--max-rows", "16", "--kv-cache", "device=100"
    )
    assert_refused(job, done, f"on {tier}", "missing", "KiB", flag)


def test_weights_read_in_place_take_no_disk(job, whole):
    """A checkpoint that can be read as it is needs no budget, and no directory to write to."""
    done = job.run_here("--device", "cpu", "--weights", "disk=100", "--disk-space", "0")
    assert done.returncode == 0, done.stderr
    assert by_index(job.lines()) == whole
    assert not job.offload.exists()


def test_a_disk_that_is_full(job):
    """Prepared weights that the disk does not take are refused; a part of them is not kept."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 * 512, before[1]))
    try:
        done = job.run_here("--device", "cpu", *PREPARE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(job, done, "reserving", str(job.offload), "File too large", "--offload-dir")
    assert job.stores() == ["lock"]
    assert sorted(path.name for path in job.directory.iterdir()) == ["in.jsonl", "offload"]


def test_a_disk_that_is_too_small(job):
    """A disk with less free space than the prepared weights is refused before it is written to."""
    job.offload.mkdir()
    mount = f"mount -t tmpfs -o size=200k none '{job.offload}'"
    own = ["unshare", "--mount", "--propagation", "private"]
    probe = subprocess.run([*own, "sh", "-c", mount], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("may not mount a file system")
    left = job.directory / "left"
    inner = f"{mount} && trap 'find {job.offload} -type f > {left}' EXIT"
    command = [*own, "sh", "-c", f'{inner}; "$@"', "sh", *job.command("--device", "cpu", *PREPARE)]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert_refused(job, done, "missing", "KiB", "--disk-space")
    assert "weights.bin" not in left.read_text()


def test_an_offload_directory_that_cannot_be_written(job):
    """A directory that cannot be made is refused, and named."""
    below_a_file = str(job.input / "directory")
    done = job.run_here("--device", "cpu", *PREPARE, "--offload-dir", below_a_file)
    assert_refused(job, done, f"preparing weights in {below_a_file}", "--offload-dir")


KILL_AT_WRITE = """
import os, signal
write, calls = os.pwritev, []
def killing(file, *arguments):
    if "flexrun-prepared" in os.readlink(f"/proc/self/fd/{file}"):
        calls.append(1)  # others measure the disk, if nobody has done it
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, *arguments)
os.pwritev = killing
import offload.prepared_writer
offload.prepared_writer.WRITE_BYTES = 65536
"""


def test_a_preparation_killed_in_the_middle(job, whole_float16, caplog):
    """After kill -9 the next run goes on with what was written; the next reuses it."""
    done = job.run("--device", "cpu", *PREPARE, fault=KILL_AT_WRITE)
    assert done.returncode == -signal.SIGKILL
    (_, unfinished) = sorted(job.stores(), key=lambda name: ".tmp" in name)
    assert ".tmp" in unfinished
    assert not job.output.exists() or job.lines() == []
    done = job.run_here("--device", "cpu", *PREPARE)
    assert done.returncode == 0, done.stderr
    assert f"in {job.offload / 'flexrun-prepared' / unfinished}" in caplog.text
    assert by_index(job.lines()) == whole_float16
    assert unfinished not in job.stores()
    (store, _) = job.stores()
    weights = job.offload / "flexrun-prepared" / store / "weights.bin"
    written = weights.stat().st_mtime_ns
    job.output = job.directory / "again.jsonl"
    done = job.run_here("--device", "cpu", *PREPARE)
    assert done.returncode == 0, done.stderr
    assert by_index(job.lines()) == whole_float16
    assert weights.stat().st_mtime_ns == written


def test_a_damaged_store(job):
    """A store in which one byte changed is an error that says what to delete."""
    assert job.run_here("--device", "cpu", *PREPARE).returncode == 0
    (store,) = (job.offload / "flexrun-prepared").glob("*/weights.bin")
    with store.open("r+b") as file:
        file.seek(100_000)
        byte = file.read(1)[0]
        file.seek(100_000)
        file.write(bytes([byte ^ 1]))
    job.output = job.directory / "again.jsonl"
    done = job.run_here("--device", "cpu", *PREPARE)
    assert done.returncode in (1, 2)
    assert f"{store} is damaged" in done.stderr
    assert f"delete {store.parent}" in done.stderr
    assert "Traceback" not in done.stderr


def fail_in_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third read of the twentieth sweep fails, once."""
    read, sweep = os.preadv, Executor.run
    sweeps, reads = itertools.count(1), itertools.count(1)
    number = 0

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal number
        number = next(sweeps)
        return sweep(*arguments, **named)

    def failing(*arguments: Any) -> int:
        if number == 20 and next(reads) == 3:
            raise OSError(errno.EIO, "Input/output error")
        return read(*arguments)

    monkeypatch.setattr(Executor, "run", counting)
    monkeypatch.setattr(os, "preadv", failing)


def test_a_read_error_in_the_middle(job, whole, monkeypatch):
    """A disk that fails once breaks the job off, and names the file; a second run does the rest."""
    flags = ["--device", "emulated", "--weights", "disk=100"]
    with monkeypatch.context() as patch:
        fail_in_sweep(patch)
        done = job.run_here(*flags)
    assert job.lines(), "it failed before anything was finished"
    assert done.returncode == 1, done.stderr
    assert f"reading {job.model / 'model.safetensors'} at byte" in done.stderr
    assert "Input/output error" in done.stderr
    assert "Traceback" not in done.stderr
    assert_the_rest_is_done(job, whole, *flags)


def assert_the_rest_is_done(job: Job, whole: list[bytes], *flags: str) -> None:
    """A second run keeps what is finished, byte for byte, and completes the job."""
    kept = job.lines()
    assert len(kept) < 24
    done = job.run_here(*flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["requests"], summary["skipped"]) == (24 - len(kept), len(kept))
    assert job.lines()[: len(kept)] == kept
    assert by_index(job.lines()) == whole


def test_a_checkpoint_written_to_while_it_is_read(job, whole):
    """A job whose weights someone touches ends with that file's name; finished results are kept."""
    weights = copied_model(job)
    done = job.run_disturbed(5, lambda: os.utime(weights), *SLOW_DISK)
    assert done.returncode == 1, done.stderr
    assert f"{weights} was changed while a job was reading it" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(job.lines()) >= 5
    assert_the_rest_is_done(job, whole, *SLOW_DISK)


def test_a_checkpoint_cut_off_while_it_is_read(job, whole):
    """A job whose weights are truncated under it ends with an error; restored, it continues."""
    weights = copied_model(job)
    content = weights.read_bytes()
    cut_off = partial(os.truncate, weights, len(content) // 2)
    done = job.run_disturbed(5, cut_off, *SLOW_DISK)
    assert done.returncode == 1, done.stderr
    assert str(weights) in done.stderr
    assert "changed" in done.stderr or "has become shorter" in done.stderr
    assert "Traceback" not in done.stderr
    weights.write_bytes(content)
    assert_the_rest_is_done(job, whole, *SLOW_DISK)


def test_a_checkpoint_replaced_while_it_is_read(job, whole):
    """A new file under the old name does not disturb a job: it goes on with the one it opened."""
    weights = copied_model(job)
    other = job.directory / "other"
    other.write_bytes(b"not weights")
    done = job.run_disturbed(5, lambda: os.replace(other, weights), *SLOW_DISK)
    assert done.returncode == 0, done.stderr
    assert weights.read_bytes() == b"not weights", "it was over before it could be disturbed"
    assert by_index(job.lines()) == whole


def test_results_that_the_disk_does_not_take(job, whole):
    """A disk that fills up breaks the job off; with space again, the same command does the rest."""
    done = job.run("--device", "cpu", limit_blocks=6)
    assert done.returncode == 1
    assert "cannot write the results" in done.stderr
    assert "the same command continues" in done.stderr
    assert "Traceback" not in done.stderr
    finished = len(job.lines())
    assert 0 < finished < 24
    done = job.run_here("--device", "cpu")
    assert done.returncode == 0
    assert f"continuing: {finished} requests are finished" in done.stderr
    assert by_index(job.lines()) == whole


def test_a_job_killed_in_the_middle_continues(job, whole):
    """After kill -9 no result is lost or repeated, whatever policy the next run has."""
    slow = ["--device", "emulated", "--emulate", "host-to-device=20MB/s", "--weights", "host=100"]
    with job.start_until(5, *slow) as process:
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    kept = [line for line in job.lines() if line.endswith(b"\n")]
    assert 5 <= len(kept) < 24
    done = job.run_here(
        "--device", "cpu", "--weights", "device=50,disk=50", "--num-micro-batches", "2"
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["requests"], summary["skipped"]) == (24 - len(kept), len(kept))
    assert job.lines()[: len(kept)] == kept
    assert by_index(job.lines()) == whole
