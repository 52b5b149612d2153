"""The proof of overlap: its report is complete and agrees with itself, whatever the speed."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.in_process import run_as_a_user, run_here

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_overlap.py"
TINY = ("--rows", "8", "--few-rows", "4", "--sweeps", "2", "--repeats", "1", "--seconds", "0.05")
LAYERS = 2
LAYER_BYTES = 4 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 704 + 2 * 256)
HEAD_BYTES = 4 * 1024 * 256


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_case(case: dict[str, Any]) -> None:
    """The bound is the longest of bytes over speed and compute; ratios are quotients."""
    for pair in case["pairs"]:
        for link, speed in case["speeds"].items():
            assert pair["link_bytes"][link] == pytest.approx(pair["link_seconds"][link] * speed)
        bound = max(pair["compute_alone_seconds"], *pair["link_seconds"].values())
        assert pair["bound_seconds"] == bound
        assert pair["ratio"] == pytest.approx(pair["sweep_seconds"] / bound)
        assert pair["speedup"] == pytest.approx(pair["no_overlap_seconds"] / pair["sweep_seconds"])
    for name in ("ratio", "speedup", "sweep_seconds"):
        assert case[name] == statistics.median(pair[name] for pair in case["pairs"])
    assert case["met"]["ratio"] == (case["ratio"] <= 1.08)
    assert ("speedup" in case["met"]) == (case["kind"] == "balanced")
    assert case["identical"]


def test_three_links_move_what_they_should(tmp_path: Path):
    """Weights from disk, keys and values both ways: nothing is attended to where it lies."""
    options = ("--layers", str(LAYERS), "--hidden", "256", "--directory", str(tmp_path))
    done = run_as_a_user(SCRIPT, *options, *TINY, "--only", "three links, balanced")
    (case,) = report(done)["cases"]
    check_case(case)
    (moved,) = (pair["link_bytes"] for pair in case["pairs"])
    assert {link for link, nbytes in moved.items() if nbytes} == {
        "disk->host",
        "host->device",
        "device->host",
    }


@pytest.mark.slow
def test_emulated_report_agrees_with_itself(tmp_path: Path):
    """All six cases are there, their bytes are the model's, and every token is the same."""
    traces = tmp_path / "traces"
    options = ("--layers", str(LAYERS), "--hidden", "256", "--directory", str(tmp_path))
    done = run_as_a_user(SCRIPT, *options, *TINY, "--trace", str(traces))
    found = report(done)
    kinds = ("link-bound", "balanced", "compute-bound")
    names = ("host->device", "three links")
    assert [(c["case"], c["kind"]) for c in found["cases"]] == [
        (n, k) for n in names for k in kinds
    ]
    for case in found["cases"]:
        check_case(case)
        free = next(each for each in found["unlimited"] if each["case"] == case["case"])
        for link, speed in case["speeds"].items():
            seconds = case["factor"] * free["compute_alone_seconds"]
            assert speed == pytest.approx(free["link_bytes"][link] / seconds)
    weights = LAYERS * LAYER_BYTES + HEAD_BYTES
    for case in found["cases"]:
        (moved,) = (pair["link_bytes"] for pair in case["pairs"])
        rows = 8 * 256 * 4  # of the embedding table, at most
        if case["case"] == "host->device":
            assert weights <= moved["host->device"] <= weights + rows
            continue
        keys_and_values = 8 * LAYERS * 2 * 64 * 4  # 8 rows of one head of 64, in float32
        assert moved["device->host"] == keys_and_values
        assert weights <= moved["disk->host"] <= weights + rows + (LAYERS + 1) * 2 * 4096
        assert moved["host->device"] > weights + 8 * LAYERS * 2 * 64 * 4 * 2
    assert len(list(traces.iterdir())) == 6
    assert [path for path in tmp_path.iterdir() if path != traces] == []


@pytest.mark.slow
def test_cpu_report_agrees_with_itself(tiny_llama_dir: Path):
    """From the real disk: read rates are bytes over time, shares are held against the targets."""
    done = run_as_a_user(SCRIPT, "--device", "cpu", "--model", str(tiny_llama_dir), *TINY)
    found = report(done)
    for pair in found["disk_bound"]:
        rate = pair["sweep_bytes"] / pair["sweep_seconds"] / 1e9
        assert pair["gb_per_s"] == pytest.approx(rate)
        assert pair["share"] == pytest.approx(rate / pair["raw_gb_per_s"])
        raw = sorted((pair["raw_before_gb_per_s"], pair["raw_after_gb_per_s"]))
        assert raw[0] <= pair["raw_gb_per_s"] <= raw[1]
    for pair in found["compute_bound"]:
        expected = pair["compute_alone_seconds"] / pair["sweep_seconds"]
        assert pair["share"] == pytest.approx(expected)
        assert pair["identical"]
        assert pair["sweep_bytes"] > 0
    assert found["met"]["disk_bound"] == (found["shares"]["disk_bound"] >= 0.9)
    assert found["met"]["compute_bound"] == (found["shares"]["compute_bound"] >= 0.85)
    assert found["raw_gb_per_s_at_load"]["disk->device"] > 0


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("--device", "cpu"), "--model"),
        (("--rows", "2"), "--rows"),
        (("--hidden", "100"), "--hidden"),
    ],
)
def test_errors_name_the_next_step(options: tuple[str, ...], hint: str):
    """A command that makes no sense is refused with the flag to change."""
    done = run_here(SCRIPT, *options)
    assert done.returncode == 2
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
