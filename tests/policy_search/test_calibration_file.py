"""Facts about where measured speeds are kept, and for which machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from offload.tiers import Tier
from policy_search import calibration_file
from policy_search.calibration_file import (
    FORMAT,
    calibration_path,
    compute_threads,
    load_calibration,
    machine_key,
    save_calibration,
)
from policy_search.errors import PolicyError
from policy_search.hardware import Hardware
from policy_search.machine_spec import MachineSpec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "cache"))


def spec(link: float = 2.5e9) -> MachineSpec:
    return MachineSpec(
        name="a machine",
        limits={Tier.DEVICE: 2**30, Tier.HOST: 2**33, Tier.DISK: 0},
        hardware=Hardware(host_to_device=link, flops=1e12, products=((1, 1e9), (16, 1e10))),
        source="a test",
    )


def test_what_was_saved_is_loaded(tmp_path):
    """A file gives back the same machine; before there is one, there is none."""
    key = machine_key("cpu", "float32", tmp_path)
    assert load_calibration(key) is None
    assert save_calibration(key, spec()) == calibration_path(key)
    assert load_calibration(key) == spec()
    save_calibration(key, spec(link=1e9))
    assert load_calibration(key) == spec(link=1e9)
    assert [path.name for path in calibration_path(key).parent.iterdir()] == [f"{key.digest}.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", "\xff", f'{{"format": {FORMAT}}}',
     f'{{"format": {FORMAT}, "machine": 1}}',
     f'{{"format": {FORMAT}, "machine": {{"speeds": {{}}}}}}'],
)  # fmt: skip
def test_a_corrupt_file_is_refused(tmp_path, text):
    """The error names the file and says how to get a good one; measuring again replaces it."""
    key = machine_key("cpu", "float32", tmp_path)
    path = calibration_path(key)
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PolicyError, match=path.name) as refused:
        load_calibration(key)
    assert "policy-search calibrate" in str(refused.value.hint)
    assert str(path) in str(refused.value.hint)
    save_calibration(key, spec())
    assert load_calibration(key) == spec()


def test_another_format_is_measured_anew(tmp_path):
    """A file of an older program counts as none."""
    key = machine_key("cpu", "float32", tmp_path)
    path = save_calibration(key, spec())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    assert load_calibration(key) is None


def test_where_nothing_can_be_written_it_is_said(monkeypatch, tmp_path):
    """The cache directory is a file."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "file"))
    with pytest.raises(PolicyError, match="cannot write") as refused:
        save_calibration(machine_key("cpu", "float32", tmp_path), spec())
    assert "FLEXRUN_CACHE" in str(refused.value.hint)


def _save_often(key, links):
    for link in links:
        save_calibration(key, spec(link))


def test_two_writers_leave_a_whole_file(tmp_path):
    """While two processes write, every reader finds one of their machines."""
    key = machine_key("cpu", "float32", tmp_path)
    save_calibration(key, spec(1.0))
    context = get_context("spawn")
    turns = [range(first, first + 40) for first in (100, 200)]
    writers = [context.Process(target=_save_often, args=(key, turn)) for turn in turns]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        found = load_calibration(key)
        assert found is not None
        seen.add(found.hardware.host_to_device)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {1.0, *turns[0], *turns[1]}
    last = load_calibration(key)
    assert last is not None
    assert last.hardware.host_to_device in (turns[0][-1], turns[1][-1])
    assert len(list(calibration_path(key).parent.iterdir())) == 1


def test_other_machines_have_other_files(tmp_path):
    """Each part of the key counts."""
    key = machine_key("cpu", "float32", tmp_path)
    others = [
        replace(key, device="cuda"),
        replace(key, dtype="bfloat16"),
        replace(key, emulated="capacity=1"),
        replace(key, processor="another"),
        replace(key, cores=key.cores + 1),
        replace(key, threads=key.threads + 1),
        replace(key, ram_gib=key.ram_gib + 1),
        replace(key, gpu="a GPU, 550.1"),
        replace(key, disk="/dev/another"),
    ]
    assert len({each.digest for each in [key, *others]}) == 10


def test_settings_of_the_emulated_machine_count_by_what_they_mean(tmp_path):
    """In any order and unit; the other devices have none."""

    def emulated(text):
        return machine_key("emulated", "float32", tmp_path, text)

    one = emulated("capacity=1GiB,host-to-device=2GB/s")
    assert one == emulated(" host-to-device=2000MB/s , capacity=1024MiB")
    assert one != emulated("capacity=1GiB,host-to-device=3GB/s")
    assert one != emulated(None)
    assert machine_key("cpu", "float32", tmp_path, None).emulated == ""


def test_a_directory_that_does_not_exist_is_on_its_parents_disk(tmp_path):
    """The offload directory is made by the first job."""
    keys = [machine_key("cpu", "float32", path) for path in (tmp_path, tmp_path / "a" / "b")]
    assert keys[0] == keys[1]


def test_the_disk_is_the_one_of_the_innermost_mount(monkeypatch, tmp_path):
    """Of several on one another the last; a directory whose name only begins alike is another."""

    def mount(device, place):
        return type("Mount", (), {"device": device, "mountpoint": str(place), "fstype": "fs"})

    mounts = [
        mount("root", "/"),
        mount("below", tmp_path),
        mount("above", tmp_path),
        mount("other", tmp_path / "o"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    (tmp_path / "offload").mkdir()
    key = machine_key("cpu", "float32", tmp_path / "offload")
    assert key.disk == f"above (fs) on {tmp_path}"


def test_the_gpu_is_named_with_its_driver(monkeypatch, tmp_path):
    """The first visible one is asked; where nothing answers, what is visible has to do."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU $4, 550.1"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert machine_key("cuda", "float32", tmp_path).gpu == "GPU 3, 550.1"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert machine_key("cuda", "float32", tmp_path).gpu == "GPU 3"
    assert machine_key("cpu", "float32", tmp_path).gpu == ""


def test_the_processor_has_a_name(monkeypatch, tmp_path):
    """Once, however many cores there are; numbers on Arm; else the architecture."""
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(calibration_file, "_CPU_INFO", info)
    names = []
    for text in (
        2 * "processor : 0\nmodel name : A: B\nmodel : 7\n\n",
        "processor : 0\nCPU implementer : 0x41\nCPU part : 0xd40\n",
        "processor : 0\n",
    ):
        info.write_text(text)
        names.append(machine_key("cpu", "float32", tmp_path).processor)
    info.unlink()
    names.append(machine_key("cpu", "float32", tmp_path).processor)
    assert names == ["A: B, 7", "0x41, 0xd40", os.uname().machine, os.uname().machine]


ENVIRONMENTS = [
    {"OMP_NUM_THREADS": "1"},
    {"MKL_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "100"},
    {"OMP_NUM_THREADS": "1,2"},
    {"OMP_NUM_THREADS": "none"},
    {"OMP_NUM_THREADS": "0"},
]


@pytest.mark.parametrize(
    "environment",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in ENVIRONMENTS)],
    ids=str,
)
def test_threads_are_those_that_torch_takes(environment):
    """As many as torch computes with, asked without it."""
    code = (
        "import sys; from policy_search.calibration_file import compute_threads; "
        "found = compute_threads(); assert 'torch' not in sys.modules; import torch; "
        "sys.exit(found != torch.get_num_threads() and f'{found} {torch.get_num_threads()}')"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_threads_on_cores_with_two_threads_each(monkeypatch, tmp_path):
    """One thread for each core that the process may run on."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 5})
    siblings = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 5: "1,5"}
    for number, text in siblings.items():
        (tmp_path / str(number)).write_text(f"{text}\n")

    def path(name):
        return tmp_path / str(name).split("/cpu/cpu")[1].split("/")[0]

    monkeypatch.setattr(calibration_file, "Path", path)
    assert compute_threads() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert compute_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert compute_threads() == 4


def test_the_key_is_the_same_with_and_without_torch(tmp_path):
    """A process without torch finds the file of this one, which has it."""
    pytest.importorskip("torch")
    key = machine_key("emulated", "float32", tmp_path, "capacity=1GiB")
    code = (
        "import sys; from pathlib import Path; from policy_search.calibration_file import *; "
        "key = machine_key('emulated', 'float32', Path(sys.argv[1]), 'capacity=1GiB'); "
        "assert 'torch' not in sys.modules; print(key.digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == key.digest
