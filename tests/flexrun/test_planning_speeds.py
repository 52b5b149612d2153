"""Speeds for plans: measured once, kept, and corrected by what runs have shown."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from flexrun.planning_speeds import ENOUGH, PlanningSpeeds
from offload.backend_cpu import CpuBackend
from offload.tiers import MemoryAccount, Tier
from policy_search.calibration_file import calibration_path, load_calibration, save_calibration
from policy_search.errors import PolicyError
from policy_search.model_profile import ModelProfile
from policy_search.model_shape import ModelShape
from tests import speeds

SHAPE = ModelShape(
    weight_bytes=1000,
    largest_layer_bytes=500,
    head_bytes=100,
    hidden_size=4,
    widest=8,
    vocab_size=16,
    kv_bytes_per_token=(1, 1),
    value_bytes=2,
)


@pytest.fixture
def planning(tmp_path, monkeypatch):
    """The real ones, of a machine that takes no time to measure."""
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(PlanningSpeeds, "_load", load)
    measured, room = [], 1 << 30

    def measure(backend, dtype, directory, *, seconds):
        measured.append(seconds)
        return speeds.machine(dict.fromkeys(Tier, room), unified=True)

    monkeypatch.setattr("flexrun.machine_calibration.measure_machine", measure)
    backend = CpuBackend(MemoryAccount(dict.fromkeys(Tier, room)))
    made = [PlanningSpeeds(torch.float32, backend, tmp_path) for _ in range(2)]
    yield (*made, measured)
    backend.close()


load, profile = PlanningSpeeds._load, PlanningSpeeds._profile
"""Before tests replace them."""


def test_a_machine_is_measured_once(planning, caplog):
    """The next job finds it, and is not told that anything is measured."""
    first, second, measured = planning
    assert not first.known()
    assert first.hardware(SHAPE) == speeds.SPEEDS
    assert "measuring this machine, once" in caplog.text
    assert second.known()
    assert second.hardware(SHAPE) == speeds.SPEEDS
    assert len(measured) == 1


def test_a_broken_file_is_measured_again(planning, caplog):
    """And replaced."""
    first, second, measured = planning
    first.hardware(SHAPE)
    calibration_path(first._key).write_text("{")
    with pytest.raises(PolicyError):
        load_calibration(first._key)
    assert second.hardware(SHAPE) == speeds.SPEEDS
    assert "it is measured again" in caplog.text
    assert len(measured) == 2
    assert load_calibration(first._key) is not None


def test_what_a_run_shows_is_in_the_next_plan(planning):
    """Of this model, for what was off; the next run's comes on top, and the median counts."""
    first, second, _ = planning
    before = first.hardware(SHAPE)
    first.learn(
        SHAPE, {"compute": 10.0, "disk->device": 10.0}, {"compute": 20.0, "disk->device": 10}
    )
    after = second.hardware(SHAPE)
    assert after.flops == before.flops / 2
    assert after.matrix_read == before.matrix_read / 2
    assert after.disk_read == before.disk_read
    assert second.hardware(replace(SHAPE, hidden_size=8)) == before
    second.hardware(SHAPE)
    second.learn(SHAPE, {"compute": 20.0}, {"compute": 30.0})
    last = first.hardware(SHAPE)
    assert last.flops == pytest.approx(before.flops / ((2 + 3) / 2))


def test_other_machines_have_their_own(planning, tmp_path):
    """What was kept for one type of values is not found for another."""
    first, _, _ = planning
    save_calibration(first._key, speeds.machine(dict.fromkeys(Tier, 1)))
    other = PlanningSpeeds(torch.bfloat16, first.backend, tmp_path)
    assert first.known()
    assert not other.known()


def test_a_model_is_measured_once(planning, monkeypatch, caplog):
    """Its layers, where the machine is known; the next job finds them."""
    first, second, _ = planning
    monkeypatch.setattr(PlanningSpeeds, "_profile", profile)
    made = []

    def measure(config, *_):
        made.append(config)
        return ModelProfile(layers=((1, 2.0),), program=0.5)

    monkeypatch.setattr("flexrun.model_profile.measured_profile", measure)
    assert first.hardware(SHAPE).profile is None, "nobody knows what model it is"
    first.config = second.config = LlamaConfig()
    first.hardware(SHAPE, measure_model=False)
    assert made == []
    found = first.hardware(SHAPE)
    assert "measuring this model's layers, once" in caplog.text
    assert found.profile == ModelProfile(layers=((1, 2.0),), program=0.5)
    assert second.hardware(SHAPE, measure_model=False) == found
    assert second.hardware(SHAPE) == found
    assert made == [first.config]


def test_two_first_jobs_measure_a_model_once(planning, monkeypatch):
    """The one that comes second waits, and finds what the other one has measured."""
    first, second, _ = planning
    monkeypatch.setattr(PlanningSpeeds, "_profile", profile)
    first.config = second.config = LlamaConfig()
    made, began = [], threading.Event()

    def measure(*_):
        made.append(1)
        began.set()
        time.sleep(0.2)
        return ModelProfile(layers=((1, 2.0),))

    monkeypatch.setattr("flexrun.model_profile.measured_profile", measure)
    first.hardware(SHAPE, measure_model=False)  # the machine, which is no model's
    with ThreadPoolExecutor(1) as other:
        running = other.submit(first.hardware, SHAPE)
        assert began.wait(10)
        assert second.hardware(SHAPE).profile == ModelProfile(layers=((1, 2.0),))
        assert running.result() == second.hardware(SHAPE)
    assert made == [1]


def test_a_model_that_cannot_be_measured_runs(planning, monkeypatch, caplog):
    """Its code may fail in any way; the machine's speeds are left."""
    first, _, _ = planning
    monkeypatch.setattr(PlanningSpeeds, "_profile", profile)
    tried = []

    def fail(*_):
        tried.append(1)
        raise RuntimeError("no such operation")

    monkeypatch.setattr("flexrun.model_profile.measured_profile", fail)
    first.config = LlamaConfig()
    assert first.hardware(SHAPE) == speeds.SPEEDS
    assert "they cannot be measured (RuntimeError: no such operation)" in caplog.text
    assert first.hardware(replace(SHAPE, weight_bytes=500)) == speeds.SPEEDS
    assert len(tried) == 1, "it would fail again"


@pytest.mark.parametrize(
    ("tier", "times"), [(Tier.DEVICE, 2), (Tier.HOST, 1), (Tier.DISK, 1)], ids=str
)
def test_a_model_on_a_small_device_is_measured_for_this_job(planning, monkeypatch, tier, times):
    """Another job has more room, and finds other caches; other tiers have no part in it."""
    first, second, _ = planning
    monkeypatch.setattr(PlanningSpeeds, "_profile", profile)
    first.backend.account.limits = dict.fromkeys(Tier, ENOUGH) | {tier: 1 << 20}
    made = []

    def measure(*_):
        made.append(1)
        return ModelProfile(layers=((1, 2.0),))

    monkeypatch.setattr("flexrun.model_profile.measured_profile", measure)
    first.config = second.config = LlamaConfig()
    for _ in range(2):
        assert first.hardware(SHAPE).profile is not None
    assert second.hardware(SHAPE).profile is not None
    assert len(made) == times
