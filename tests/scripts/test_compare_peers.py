"""The comparison with other engines, and the memory cap that it runs them under."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
MIB = 2**20
HOLD_200_MIB = "import time; held = bytearray(200 << 20); time.sleep(0.5); print('held')"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def capped(
    tmp_path: Path, limit: str, *options: str, code: str = HOLD_200_MIB
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    facts = tmp_path / "facts.json"
    command = [sys.executable, str(SCRIPTS / "memory_cap.py"), "--limit", limit]
    command += ["--json", str(facts), *options, "--", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert facts.exists(), done.stderr
    return done, json.loads(facts.read_text())


@pytest.mark.parametrize("method", ["auto", "watchdog"])
def test_cap_reports_the_peak(tmp_path: Path, method: str):
    """A child that holds 200 MiB under a larger cap ends well and is reported with its peak."""
    done, facts = capped(tmp_path, "500MiB", "--method", method)
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr
    assert facts["stopped"] is None
    assert 200 * MIB <= facts["peak_rss_bytes"] < 300 * MIB
    if facts["peak_cgroup_bytes"] is not None:
        assert 200 * MIB <= facts["peak_cgroup_bytes"] < 400 * MIB
    assert f"limit {500} MiB" in done.stderr


@pytest.mark.parametrize("method", ["auto", "watchdog"])
def test_cap_stops_what_needs_more(tmp_path: Path, method: str):
    """A child that wants 200 MiB under a cap of 100 MiB is killed, and the report says why."""
    done, facts = capped(tmp_path, "100MiB", "--method", method)
    assert (done.returncode, done.stdout) == (137, ""), done.stderr
    assert facts["stopped"] == "limit"
    assert facts["exit_code"] == -9


def test_cap_ends_the_whole_tree_in_time(tmp_path: Path):
    """After a timeout no process of the command is left."""
    marker = "600.25"
    code = f"import subprocess; subprocess.run(['sleep', '{marker}'])"
    done, facts = capped(tmp_path, "500MiB", "--timeout", "1", code=code)
    assert (done.returncode, facts["stopped"]) == (137, "timeout")
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_bytes().split(b"\0"))
        except OSError:
            continue  # it ended meanwhile
    assert [c for c in commands if c[:2] == [b"sleep", marker.encode()]] == []


def test_cap_passes_the_exit_code_on(tmp_path: Path):
    """The command's own exit code is the cap's."""
    done, facts = capped(tmp_path, "500MiB", code="raise SystemExit(3)")
    assert (done.returncode, facts["exit_code"], facts["stopped"]) == (3, 3, None)


def compare(model: Path, work: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "compare_peers.py"), "--model", str(model)]
    command += ["--drop-cache", "files", "--repeats", "1", "--work-dir", str(work), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def random_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compared") / "tiny"
    command = [sys.executable, str(SCRIPTS / "make_random_model.py"), "tiny", str(directory)]
    subprocess.run([*command, "--dtype", "float32"], capture_output=True, check=True)
    return directory


@pytest.mark.slow
def test_comparison_counts_and_agrees(random_dir: Path, tmp_path: Path):
    """flexrun and Accelerate make the same tokens, as many as asked for; what fails is a row."""
    options = ("--prompts", "5", "--prompt-tokens", "4-17", "--new-tokens", "6")
    peers = ("--peers", "accelerate,llamacpp", "--batch-sizes", "2,8", "--memory-cap", "1GiB")
    done = compare(random_dir, tmp_path, *options, *peers)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert table[0].startswith("| engine | batch |")
    rows = {row["engine"]: row for row in json.loads(last)["rows"]}
    for engine in ("flexrun", "accelerate"):
        assert rows[engine]["failure"] is None, done.stderr
        assert rows[engine]["tokens"] == 5 * 6
        assert rows[engine]["same_as_flexrun"] == 1.0
        assert rows[engine]["seconds"] > 0
        assert any(line.startswith(f"| {engine} | ") for line in table)
    assert rows["flexrun"]["ratio_to_flexrun"] == 1.0
    batches = [m["batch"] for m in json.loads(last)["measurements"] if m["engine"] == "accelerate"]
    assert batches == [2, 5]
    assert rows["llamacpp"]["failure"] is not None
    assert list(tmp_path.iterdir()) == []


def test_every_failure_is_a_row(random_dir: Path, tmp_path: Path):
    """Engines that the cap kills, and those that cannot fit, are lines of the table."""
    options = ("--prompts", "2", "--prompt-tokens", "4", "--new-tokens", "3", "--memory-cap", "5MB")
    done = compare(random_dir, tmp_path, *options, "--peers", "transformers")
    assert done.returncode == 0, done.stderr
    rows = {row["engine"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert "killed by the memory cap" in rows["flexrun"]["failure"]
    assert "does not fit" in rows["transformers"]["failure"]


def test_wrong_settings_are_named(random_dir: Path, tmp_path: Path):
    """A missing checkpoint and an unknown peer are errors with a next step."""
    done = compare(tmp_path, tmp_path, "--memory-cap", "1GiB")
    assert done.returncode == 1
    assert "make_random_model.py" in done.stderr
    done = compare(random_dir, tmp_path, "--memory-cap", "1GiB", "--peers", "nobody")
    assert done.returncode == 2
    assert "accelerate, transformers" in done.stderr
