"""What the command says and leaves behind when something is wrong: real runs in real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.reference import ragged_prompts

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
GENERATE = [sys.executable, "-m", "flexrun", "generate"]


class Job:
    """A job of 24 prompts in a directory of its own."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory, self.model = directory, model
        self.input = directory / "in.jsonl"
        self.output = directory / "out.jsonl"
        prompts = ragged_prompts(24, longest=7)
        self.input.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))

    def command(self, *flags: str) -> list[str]:
        files = ["--model", self.model, "--input", self.input, "--output", self.output]
        fixed = ["--dtype", "float32", "--max-tokens", "12", "--max-sequences", "6"]
        return [*GENERATE, *map(str, files), *fixed, *flags]

    def run(self, *flags: str, limit_blocks: int | None = None) -> subprocess.CompletedProcess[str]:
        """Run to the end; `limit_blocks` of 512 bytes is the largest file that can be written."""
        command = self.command(*flags)
        if limit_blocks is not None:
            limit = f'ulimit -f {limit_blocks} && exec "$@"'
            command = ["/bin/sh", "-c", limit, "sh", *command]
        return subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )

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
    done = job.run("--device", "cpu")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["requests"], summary["failed"], summary["skipped"]) == (24, 0, 0)
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
    assert_refused(job, job.run(), "there is no model at", str(job.model))


def test_truncated_weights(job):
    """A safetensors file that ends too early is named, before any sweep."""
    weights = copied_model(job)
    os.truncate(weights, weights.stat().st_size - 1000)
    assert_refused(job, job.run(), str(weights), "truncated")


def test_a_corrupt_header(job):
    """A safetensors file whose header is not JSON is named."""
    weights = copied_model(job)
    with weights.open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 40)
    assert_refused(job, job.run(), str(weights), "header")


@pytest.mark.parametrize(
    ("tier", "flags"),
    [
        ("device", ["--device", "emulated", "--emulate", "capacity=400KiB"]),
        ("host", ["--device", "emulated", "--weights", "host=100", "--host-memory", "300KiB"]),
        ("disk", ["--device", "cpu", "--weights", "disk=100", "--disk-space", "300KiB"]),
    ],
)
def test_a_budget_that_is_too_small(job, tier, flags):
    """A model that does not fit is refused with what is missing, where, and the flag that helps."""
    flag = {"device": "--device-memory", "host": "--host-memory", "disk": "--disk-space"}[tier]
    done = job.run(*flags, "--micro-batch", "16", "--max-rows", "16", "--kv-cache", "device=100")
    assert_refused(job, done, f"on {tier}", "missing", "KiB", flag)


def test_a_disk_that_is_full(job):
    """An offload file that the disk does not take is refused, and names the flag that helps."""
    flags = ["--device", "cpu", "--weights", "disk=100", "--offload-dir", str(job.directory)]
    done = job.run(*flags, limit_blocks=200)
    assert_refused(job, done, "reserving", str(job.directory), "File too large", "--offload-dir")
    assert sorted(path.name for path in job.directory.iterdir()) == ["in.jsonl"]


def test_an_offload_directory_that_cannot_be_written(job):
    """A directory that cannot be made is refused, and named."""
    below_a_file = str(job.input / "directory")
    done = job.run("--device", "cpu", "--weights", "disk=100", "--offload-dir", below_a_file)
    assert_refused(job, done, f"creating an offload file in {below_a_file}", "--offload-dir")


def test_results_that_the_disk_does_not_take(job, whole):
    """A disk that fills up breaks the job off; with space again, the same command does the rest."""
    done = job.run("--device", "cpu", limit_blocks=6)
    assert done.returncode == 1
    assert "cannot write the results" in done.stderr
    assert "the same command continues" in done.stderr
    assert "Traceback" not in done.stderr
    finished = len(job.lines())
    assert 0 < finished < 24
    done = job.run("--device", "cpu")
    assert done.returncode == 0
    assert f"continuing: {finished} requests are finished" in done.stderr
    assert by_index(job.lines()) == whole


def test_a_job_killed_in_the_middle_continues(job, whole):
    """After kill -9 no result is lost or repeated, whatever policy the next run has."""
    slow = ["--device", "emulated", "--emulate", "host-to-device=20MB/s", "--weights", "host=100"]
    with subprocess.Popen(
        job.command(*slow),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        while process.poll() is None and (not job.output.exists() or len(job.lines()) < 5):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    kept = [line for line in job.lines() if line.endswith(b"\n")]
    assert 5 <= len(kept) < 24
    done = job.run("--device", "cpu", "--weights", "device=50,disk=50", "--num-micro-batches", "2")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["requests"], summary["skipped"]) == (24 - len(kept), len(kept))
    assert job.lines()[: len(kept)] == kept
    assert by_index(job.lines()) == whole
