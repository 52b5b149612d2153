"""The benchmark of links: its report is complete and agrees with itself, whatever the speed."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.in_process import run_as_a_user, run_here

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_links.py"


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, Any], repeats: int) -> None:
    """Rates are bytes over seconds, medians are medians, shares are quotients."""
    for row in found["rows"]:
        for name in ("alone", "together"):
            samples, rate = row[name], row[f"{name}_gb_per_s"]
            if name == "together" and row["together_with"] is None:
                assert (samples, rate, row["share_kept"]) == ([], None, None)
                continue
            assert len(samples) == repeats
            rates = [sample["bytes"] / sample["seconds"] / 1e9 for sample in samples]
            assert rate == pytest.approx(statistics.median(rates))
        if row["share_kept"] is not None:
            expected = row["together_gb_per_s"] / row["alone_gb_per_s"]
            assert row["share_kept"] == pytest.approx(expected)


def test_cpu_measures_disk_and_memory(tmp_path: Path):
    """On a CPU there is a row for every way to use the disk, and the test files are gone."""
    options = ("--device", "cpu", "--size", "8MiB", "--seconds", "0.05", "--repeats", "2")
    done = run_as_a_user(SCRIPT, "--directory", str(tmp_path), *options)
    assert done.returncode == 0, done.stderr
    found = report(done)
    check(found, repeats=2)
    together = {row["link"] for row in found["rows"] if row["together_with"] == "all"}
    assert together == {"disk->device", "host->disk", "RAM->RAM"}
    alone = {row["link"] for row in found["rows"] if row["together_with"] is None}
    ways = ("1 request in flight", "page cache")
    assert alone == {f"{link}, {way}" for link in ("disk->device", "host->disk") for way in ways}
    cached = next(row for row in found["rows"] if row["link"] == "disk->device, page cache")
    assert [sample["bytes"] for sample in cached["alone"]] == [8 * 2**20] * 2
    assert found["machine"]["torch"]
    assert found["date"]
    assert "--seconds 0.05" in found["command"]
    assert done.stdout.startswith("| link | alone, GB/s | together, GB/s | share kept |\n")
    assert list(tmp_path.iterdir()) == []


def test_emulated_is_held_to_the_stated_speeds(tmp_path: Path):
    """Every emulated link has its stated speed beside it; the exit code says if all are reached."""
    stated = "host-to-device=200MB/s,device-to-host=100MB/s,disk-read=50MB/s,disk-write=50MB/s"
    options = ["--device", "emulated", "--emulate", stated, "--size", "8MiB"]
    options += ["--seconds", "0.1", "--repeats", "1"]
    done = run_here(SCRIPT, "--directory", str(tmp_path), *options)
    found = report(done)
    check(found, repeats=1)
    speeds = {row["link"]: row["stated_gb_per_s"] for row in found["rows"]}
    links = ("host->device", "device->host", "disk->host", "host->disk")
    assert [speeds[link] for link in links] == [0.2, 0.1, 0.05, 0.05]
    for row in found["rows"]:
        if row["stated_gb_per_s"] is not None:
            assert row["reached"] == (row["alone_gb_per_s"] >= 0.95 * row["stated_gb_per_s"])
    assert done.returncode == (0 if found["stated_reached"] else 1)
    pairs = {row["link"] for row in found["rows"] if row["together_with"] == "both directions"}
    assert pairs == {"host->device", "device->host"}


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("--size", "1EB"), "--size"),
        (("--size", "100TB"), "--directory"),
        (("--device", "cpu", "--emulate", "disk-read=1GB/s"), "emulated"),
        (("--repeats", "0"), "--repeats"),
    ],
)
def test_errors_name_the_next_step(tmp_path: Path, options: tuple[str, ...], hint: str):
    """What cannot be measured is refused before anything is written, with what to do instead."""
    done = run_here(SCRIPT, "--directory", str(tmp_path), *options)
    assert done.returncode != 0
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
