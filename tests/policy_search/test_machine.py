"""Facts about what a machine is found to have."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from policy_search import machine


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 fma", False),
        ("flags\t\t: fpu avx2 avx512f avx512bw avx512vl", False),
        ("flags\t\t: fpu avx2 avx512f avx512bw avx512vl avx512_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("Features\t: fp asimd", False),
        ("processor\t: 0", True),
    ],
)
def test_the_computed_type_follows_the_processor(monkeypatch, tmp_path, flags, expected):
    """A CPU that says what it can, but no 16-bit products among it, computes in float32."""
    (tmp_path / "cpuinfo").write_text(f"model name : x\n{flags}\n")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    machine.multiplies_bfloat16.cache_clear()
    try:
        assert machine.multiplies_bfloat16() is expected
        assert machine.computed_on_cpu("bfloat16") == ("bfloat16" if expected else "float32")
        assert machine.computed_on_cpu("float16") == "float32"
        assert machine.computed_on_cpu("float32") == "float32"
    finally:
        machine.multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize("version", [1, 2])
def test_the_host_budget_obeys_the_control_group(monkeypatch, tmp_path, version):
    """A limit on this process's group counts; files in the group's memory do not."""
    group = tmp_path / "job"
    group.mkdir()
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    names = names if version == 1 else ("memory.max", "memory.current")
    (group / names[0]).write_text("1000000\n")
    (group / names[1]).write_text("700000\n")
    prefix = "total_" if version == 1 else ""
    (group / "memory.stat").write_text(
        f"rss 1\n{prefix}inactive_file 100000\n{prefix}active_file 50000\n"
    )
    (tmp_path / names[0]).write_text("max\n")
    monkeypatch.setattr(machine, "_memory_groups", lambda: [(group, *names), (tmp_path, *names)])
    assert machine.host_budget() == int(450_000 * machine.SHARE_OF_FREE)


def test_without_a_group_the_free_memory_counts(monkeypatch):
    """Groups that do not exist or have no limit change nothing."""
    monkeypatch.setattr(machine, "_memory_groups", lambda: [(Path("/nowhere"), "a", "b")])
    free = psutil.virtual_memory().available
    assert machine.host_budget() == pytest.approx(free * machine.SHARE_OF_FREE, rel=0.2)


def test_the_offload_directory(monkeypatch, tmp_path):
    """It is the given one, else the environment's, else the user's cache."""
    assert machine.offload_dir(tmp_path) == tmp_path
    monkeypatch.setenv("FLEXRUN_OFFLOAD_DIR", str(tmp_path / "fast"))
    assert machine.offload_dir(None) == tmp_path / "fast"
    monkeypatch.delenv("FLEXRUN_OFFLOAD_DIR")
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "cache"))
    assert machine.offload_dir(None) == tmp_path / "cache"
