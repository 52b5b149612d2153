"""Facts about machines by name: what was measured on such machines, and what may be replaced."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from offload.tiers import Tier
from policy_search.errors import PolicyError
from policy_search.hardware import Hardware
from policy_search.machine_spec import MachineSpec
from policy_search.named_models import NAMED_MODELS
from policy_search.planner import Planner
from policy_search.policy import Policy
from policy_search.presets import PRESETS, machine
from policy_search.workload import JobLengths

GIB = 2**30
NAMES = ["t4", "3090", "4090", "a10g", "l4", "a100", "h100", "h200", "gh200", "laptop", "cpu"]
NOT_MEASURED = ("contention", "products")
SPEEDS = [each.name for each in fields(Hardware) if each.name not in NOT_MEASURED]
ONLY_WITH_A_GPU = {"host_to_device", "device_to_host", "host_attention"}


def planned(spec, name):
    planner = Planner(
        config=NAMED_MODELS[name],
        dtype="auto",
        limits=spec.limits,
        unified=spec.unified,
        context=1024,
        batch={"micro_batch_rows": None, "max_rows": None, "max_sequences": None},
        job=JobLengths(2048, 512, 128),
        hardware=spec.hardware,
    )
    return planner.plan(Policy())


def test_all_machines_are_there():
    """The names that are documented."""
    assert sorted(PRESETS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_speed_is_known(name):
    """All speeds have a limit, but those that a machine without a GPU does not have."""
    spec = PRESETS[name]
    unknown = {each for each in SPEEDS if getattr(spec.hardware, each) == math.inf}
    assert unknown == (ONLY_WITH_A_GPU if spec.unified else set())
    assert spec.unified == (name == "cpu")
    assert spec.source
    assert spec.name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_can_be_written_and_read(name, tmp_path):
    """As a file that can be corrected by hand."""
    path = tmp_path / "machine.json"
    path.write_text(PRESETS[name].to_json())
    assert MachineSpec.load(path) == PRESETS[name] == machine(str(path), {})


def test_the_t4_is_flexgens():
    """Its link and operations are what FlexGen's authors fitted there (their cost_model.py); the
    memory has room for what they had in it: half of OPT-175B's 325 GiB, and its KV cache on disk.
    """
    spec = machine("T4", {})
    assert spec.hardware.host_to_device == 12.89 * GIB
    assert spec.hardware.flops == 21.24e12
    assert spec.limits[Tier.HOST] > 325 * GIB / 2
    assert spec.limits[Tier.DISK] > 4608 * 1024 * 256 * (512 + 32)
    assert "FlexGen" in spec.source


@pytest.mark.parametrize(
    ("name", "speed", "measured", "part"),
    [
        # nvbandwidth's issues 42, 15 (eight cards, 23.9 to 26.4) and 24
        ("a100", "host_to_device", 25.13e9, 0.05),
        ("4090", "host_to_device", 25.6e9, 0.05),
        ("h100", "device_to_host", 52.77e9, 0.05),
        # FlexGen's paper, its machine: about 12 GB/s over PCIe
        ("t4", "device_to_host", 12e9, 0.1),
    ],
)
def test_speeds_are_near_measured_ones(name, speed, measured, part):
    """What such machines were measured to reach, apart from what a preset is made of."""
    assert getattr(PRESETS[name].hardware, speed) == pytest.approx(measured, rel=part)


def test_nothing_in_ram_is_faster_than_ram():
    """Links in sum, and attention on the processor, are bound by what RAM delivers."""
    for spec in PRESETS.values():
        speeds = spec.hardware
        if not spec.unified:
            assert speeds.host_attention < speeds.links_together <= speeds.matrix_read
            assert speeds.host_to_device <= speeds.links_together
        assert speeds.disk_write <= speeds.disk_read <= speeds.links_together
        assert speeds.attention_flops < speeds.flops


@pytest.mark.parametrize("name", NAMES)
def test_each_machine_has_a_plan(name):
    """Of a model that is larger than every GPU's memory: bytes are on other tiers then."""
    limits = PRESETS[name].limits
    plan = planned(PRESETS[name], "llama-3-70b")
    shape, memory = plan.shape, plan.memory
    assert all(memory[tier].weights <= limits[tier] for tier in Tier)
    away = memory[Tier.HOST].weights + memory[Tier.DISK].weights
    assert away >= shape.weight_bytes - limits[Tier.DEVICE]
    assert name == "cpu" or away > 0


def test_values_can_be_replaced():
    """Memories and speeds; the rest stays, and the source says what was given."""
    spec = machine("3090", {"host_memory": 64 * GIB, "disk_space": 0, "disk_read": 3e9})
    before = PRESETS["3090"]
    assert spec.limits == before.limits | {Tier.HOST: 64 * GIB, Tier.DISK: 0}
    assert spec.hardware == replace(before.hardware, disk_read=3e9)
    assert spec.source == f"{before.source}; as given: host_memory, disk_space, disk_read"
    assert machine("3090", {}) == before


@pytest.mark.parametrize("given", ["device_memory", "host_memory"])
def test_a_cpus_memories_are_one(given):
    """Either name means the RAM; of both, the smaller one."""
    spec = machine("cpu", {given: 8 * GIB})
    assert spec.limits[Tier.DEVICE] == spec.limits[Tier.HOST] == 8 * GIB
    both = machine("cpu", {"device_memory": 8 * GIB, "host_memory": 4 * GIB})
    assert both.limits[Tier.DEVICE] == both.limits[Tier.HOST] == 4 * GIB


def test_a_given_rate_replaces_measured_products(tmp_path):
    """A file's list of products would otherwise hide it."""
    known = replace(PRESETS["a100"].hardware, products=((1, 1e9), (64, 1e12)))
    path = tmp_path / "own.json"
    path.write_text(replace(PRESETS["a100"], hardware=known).to_json())
    assert machine(str(path), {"disk_read": 1e9}).hardware.products == known.products
    assert machine(str(path), {"flops": 1e13}).hardware.products == ()
    assert machine(str(path), {"matrix_read": 1e12}).hardware.products == ()


def test_a_files_two_limits_stay_apart(tmp_path):
    """What a file says of a CPU's memory is kept where nothing replaces it."""
    path = tmp_path / "cpu.json"
    limits = PRESETS["cpu"].limits | {Tier.DEVICE: GIB}
    path.write_text(replace(PRESETS["cpu"], limits=limits).to_json())
    assert machine(str(path), {"disk_read": 1e9}).limits == limits


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True])
def test_a_speed_must_be_a_number_above_zero(value):
    """The error names the speed and what was given."""
    with pytest.raises(PolicyError, match="the speed flops must be a number above 0") as caught:
        machine("h100", {"flops": value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [-1, 1.5, math.nan])
def test_a_memory_must_be_whole_bytes(value):
    """The error names the memory."""
    with pytest.raises(PolicyError, match="host_memory must be a whole number of bytes"):
        machine("h100", {"host_memory": value})


def test_unknown_names_are_refused_with_the_known_ones(tmp_path):
    """Of machines, of values, and of files that are not there."""
    with pytest.raises(PolicyError, match="no machine is known as 'v100'") as caught:
        machine("v100", {})
    assert all(name in str(caught.value) for name in NAMES)
    with pytest.raises(PolicyError, match="a machine has no ram") as caught:
        machine("t4", {"ram": 1})
    assert "host_memory" in str(caught.value)
    assert "links_together" in str(caught.value)
    with pytest.raises(PolicyError, match="a machine has no products"):
        machine("t4", {"products": 1})
    with pytest.raises(PolicyError, match="cannot read the machine"):
        machine(str(tmp_path / "none.json"), {})
