"""Facts about how a machine is measured."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from flexrun import attention_calibration, compute_calibration, link_calibration
from flexrun.machine_calibration import measure_machine
from flexrun.measuring import Room, median_of, median_seconds
from offload.backend import DeviceBackend
from offload.backend_cpu import CpuBackend
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.direct_file import DirectFile
from offload.errors import OffloadStoreError
from offload.slabs import Weight
from offload.tiers import MemoryAccount, Tier
from policy_search.__main__ import main
from policy_search.calibration_file import load_calibration, machine_key
from policy_search.hardware import Hardware
from policy_search.machine_spec import MachineSpec

SECONDS = 0.05
"""A measurement is made at least once, however short its part of the time."""
LIMITS = {Tier.DEVICE: 8 << 20, Tier.HOST: 12 << 20, Tier.DISK: 4 << 20}
DISK_SPEEDS = {"disk_read", "disk_write"}
EVERYWHERE = {
    "links_together",
    "swap",
    "flops",
    "matrix_read",
    "expansion",
    "device_attention",
    "attention_flops",
}
BETWEEN_MEMORIES = {"host_to_device", "device_to_host", "host_attention"}
PROPERTY = "host-to-device=200MB/s"


@pytest.fixture(autouse=True)
def _one_thread():
    """Teams of threads wait for each other where other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def open_backend(
    name: str, limits: dict[Tier, int] | None = None, machine: str | None = None
) -> DeviceBackend:
    account = MemoryAccount(limits=LIMITS if limits is None else limits)
    if name == "cpu":
        return CpuBackend(account)
    return EmulatedBackend(
        account, EmulatedMachine.parse(machine) if machine else EmulatedMachine()
    )


def measure(backend: DeviceBackend, directory: Path, dtype=torch.float32) -> MachineSpec:
    with contextlib.closing(backend):
        return measure_machine(backend, dtype, directory, seconds=SECONDS)


def found(machine: MachineSpec) -> set[str]:
    """Speeds that have a limit."""
    values = {field.name: getattr(machine.hardware, field.name) for field in fields(Hardware)}
    speeds = EVERYWHERE | BETWEEN_MEMORIES | DISK_SPEEDS
    assert all(values[name] > 0 for name in speeds)
    return {name for name in EVERYWHERE | BETWEEN_MEMORIES | DISK_SPEEDS if values[name] < math.inf}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.bfloat16), ("emulated", torch.float32)],
)
def test_all_that_plans_ask_for_is_measured(tmp_path, name, dtype):
    """Within the budgets, all of it given back, and no file is left."""
    backend = open_backend(name)
    machine = measure(backend, tmp_path, dtype)
    wanted = EVERYWHERE | DISK_SPEEDS | (set() if name == "cpu" else BETWEEN_MEMORIES)
    assert found(machine) == wanted
    assert 0 <= machine.hardware.contention < 1
    assert (machine.hardware.hosted_call > 0) == (name == "emulated")
    rows = [rows for rows, _ in machine.hardware.products]
    assert rows[:3] == [1, 4, 16]
    assert machine.hardware.flops == max(speed for _, speed in machine.hardware.products)
    assert machine.unified == (name == "cpu")
    assert machine.limits == LIMITS
    account = backend.account
    assert account.used == dict.fromkeys(Tier, 0)
    assert all(account.peak[tier] <= LIMITS[tier] for tier in Tier)
    assert account.peak[Tier.DISK] > 0
    assert list(tmp_path.iterdir()) == []
    assert MachineSpec.from_json(machine.to_json(), "x") == machine


def test_links_are_found_as_fast_as_they_are(tmp_path):
    """One of an emulated machine's has a stated speed, the others are as fast as memory."""
    backend = open_backend("emulated", machine="host-to-device=200MB/s")
    hardware = measure(backend, tmp_path).hardware
    assert 100e6 < hardware.host_to_device < 220e6
    assert hardware.device_to_host > hardware.host_to_device


def test_pages_are_as_fast_as_their_link(tmp_path):
    """What waits goes over the link to HOST, or to disk where RAM is the device's memory."""
    backend = open_backend("emulated", machine="device-to-host=200MB/s,disk-write=100MB/s")
    hardware = measure(backend, tmp_path).hardware
    assert 100e6 < hardware.swap < 220e6
    assert 20e6 < hardware.disk_write < 110e6


@pytest.mark.parametrize("name", ["cpu", "emulated"])
@pytest.mark.parametrize(
    ("tier", "missing"),
    [
        (Tier.DISK, DISK_SPEEDS),
        (Tier.HOST, DISK_SPEEDS | BETWEEN_MEMORIES | {"swap", "links_together"}),
        (Tier.DEVICE, EVERYWHERE | BETWEEN_MEMORIES - {"host_attention"}),
    ],
)
def test_what_there_is_no_room_for_has_no_limit(tmp_path, name, tier, missing):
    """A tier without a byte is no error: what needs it is left out."""
    backend = open_backend(name, LIMITS | {tier: 0})
    machine = measure(backend, tmp_path)
    everything = EVERYWHERE | DISK_SPEEDS | BETWEEN_MEMORIES
    if name == "cpu":  # HOST is not used, the disk's links need DEVICE
        everything -= BETWEEN_MEMORIES
        missing = {
            Tier.DISK: DISK_SPEEDS | {"swap", "links_together"},
            Tier.HOST: set(),
            Tier.DEVICE: everything,
        }[tier]
    elif tier is Tier.DEVICE:
        missing = missing - {"links_together"}  # the disk's two links are left
    assert found(machine) == everything - missing
    assert backend.account.used == dict.fromkeys(Tier, 0)
    assert backend.account.peak[tier] == 0


@pytest.mark.parametrize("kib", [1, 300, 5000])
@pytest.mark.parametrize("name", ["cpu", "emulated"])
def test_small_budgets_are_kept(tmp_path, name, kib):
    """Measuring takes less, or is left out, and never raises."""
    backend = open_backend(name, dict.fromkeys(Tier, kib << 10))
    measure(backend, tmp_path)
    assert backend.account.used == dict.fromkeys(Tier, 0)


STEPS = [
    (DirectFile, "write"),
    (link_calibration, "raw_speeds"),
    (link_calibration, "speed_together"),
    (compute_calibration, "median_seconds"),
    (Weight, "fill"),
    (attention_calibration, "measured_speed"),
    (attention_calibration, "build_group"),
]


@pytest.mark.parametrize(
    ("where", "name"), STEPS, ids=lambda value: getattr(value, "__name__", value)
)
def test_an_error_in_the_middle_leaves_nothing(monkeypatch, tmp_path, where, name):
    """Memory and disk space are given back, and there is no file."""

    def fail(*_, **__):
        raise OffloadStoreError("broken")

    monkeypatch.setattr(where, name, fail)
    backend = open_backend("emulated")
    with pytest.raises(OffloadStoreError, match="broken"):
        measure(backend, tmp_path)
    assert sum(backend.account.peak.values()) > 0
    assert backend.account.used == dict.fromkeys(Tier, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_files_is_said(tmp_path):
    """The offload directory is a file."""
    (tmp_path / "file").touch()
    backend = open_backend("cpu")
    with pytest.raises(OffloadStoreError, match="creating"):
        measure(backend, tmp_path / "file")
    assert backend.account.used == dict.fromkeys(Tier, 0)


def test_only_what_was_written_is_read(monkeypatch, tmp_path):
    """Blocks that were never written would not come from a disk; the links are not at odds."""
    written: set[int] = set()
    read: set[int] = set()
    real = {name: getattr(DirectFile, name) for name in ("read", "write")}

    def note(name, blocks):
        def move(self, offset, tensor):
            blocks.update(range(offset, offset + tensor.nbytes, 4096))
            real[name](self, offset, tensor)

        monkeypatch.setattr(DirectFile, name, move)

    note("read", read)
    note("write", written)
    measure(open_backend("cpu"), tmp_path)
    assert read
    assert read <= written


@pytest.mark.parametrize("took", [1e-5, 0.5])
def test_short_calls_follow_each_other_without_a_wait(monkeypatch, took):
    """The device is waited for twice for each measurement, however many calls it is of."""
    clock = [0.0]
    calls, waits = [0], [0]

    class Device(CpuBackend):
        def synchronize(self, event):
            waits[0] += 1

    def call():
        calls[0] += 1
        clock[0] += took

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    with contextlib.closing(Device(MemoryAccount())) as backend:
        assert median_seconds(backend, call, 0.0) == pytest.approx(took)
    # One to warm up, one to see how long it takes, and those that count.
    assert waits[0] == 4
    assert calls[0] == 2 + max(1, round(0.002 / took))


def test_a_median_is_of_what_fits_into_the_time(monkeypatch):
    """At least one, whatever it takes."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def measure(turn):
        clock[0] += 1.0
        return [5.0, 1.0, 2.0, 9.0][turn]

    assert median_of(measure, 0.0) == 5.0
    assert median_of(measure, 2.5) == 2.0


@pytest.mark.parametrize("size", [1, 1 << 16, 200_001])
def test_values_are_numbers(size):
    """All of them, also where they are repeated."""
    values = Room.numbers(torch.zeros(2 * size, dtype=torch.uint8), torch.bfloat16)
    assert len(values) == size
    assert torch.isfinite(values).all()
    assert values.unique().numel() > min(size, 1000) // 2


def calibrate(tmp_path, monkeypatch, *words):
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "cache"))
    small = ["--device-memory", "8MiB", "--host-memory", "8MiB", "--disk-space", "4MiB"]
    given = [*small, "--seconds", "0.05", "--offload-dir", str(tmp_path / "offload")]
    return main(["calibrate", *given, *words])


def test_the_command_keeps_what_it_prints(tmp_path, monkeypatch, capsys):
    """The cache is found by its key; the file is read as a machine; both say the same."""
    path = tmp_path / "machine.json"
    flags = ["--device", "emulated", "--emulate", PROPERTY, "--dtype", "float32"]
    assert calibrate(tmp_path, monkeypatch, *flags, "--json", "-o", str(path)) == 0
    printed = json.loads(capsys.readouterr().out)
    machine = MachineSpec.load(path)
    assert MachineSpec.from_json(json.dumps(printed["machine"]), "stdout") == machine
    key = machine_key("emulated", "float32", tmp_path / "offload", PROPERTY)
    assert load_calibration(key) == machine
    assert machine.limits == {Tier.DEVICE: 8 << 20, Tier.HOST: 8 << 20, Tier.DISK: 4 << 20}
    assert printed["seconds"]["all"] > sum(printed["seconds"].values()) / 2


def test_the_table_has_every_speed(tmp_path, monkeypatch, capsys):
    """A line each, with its unit; what was not measured is not there."""
    assert calibrate(tmp_path, monkeypatch, "--device", "cpu", "--dtype", "float32") == 0
    text = capsys.readouterr().out
    for what in ("disk, read", "disk, written", "all links at once", "attention on the device"):
        assert f"\n{what}" in text
    assert "GB/s" in text
    assert "GFLOP/s" in text
    assert "products of 1 row " in text
    assert "host to device" not in text
    assert "attention on host" not in text
    assert str(tmp_path / "cache" / "calibration") in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seconds", "0"], "not a number above 0"),
        (["--seconds", "nan"], "not a number above 0"),
        (["--seconds", "long"], "not a number above 0"),
        (["--device", "tpu"], "invalid choice"),
        (["--dtype", "int8"], "invalid choice"),
        (["--device", "cpu", "--emulate", "capacity=1GiB"], "--emulate"),
        (["--device", "emulated", "--emulate", "speed=1"], "cannot read 'speed=1'"),
        (["--device-memory", "much"], "cannot read the size"),
        (["-o", "/no/such/directory/file.json"], "no directory"),
        (["--model", "x"], "--model"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, monkeypatch, capsys, words, said):
    """Exit code 2, a message, a hint, and nothing is measured."""
    assert calibrate(tmp_path, monkeypatch, *words) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert output.out == ""
    assert not (tmp_path / "cache").exists()


def test_an_interrupt_keeps_nothing(tmp_path, monkeypatch, capsys):
    """No traceback, and the exit code of an interrupted command."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("flexrun.machine_calibration.measured_products", interrupt)
    assert calibrate(tmp_path, monkeypatch, "--device", "cpu") == 130
    assert "interrupted" in capsys.readouterr().err
    assert os.listdir(tmp_path / "offload") == []
    assert not (tmp_path / "cache").exists()
