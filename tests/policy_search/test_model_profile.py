"""What a model was measured to take, and what the cost model makes of it."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
from dataclasses import replace

import pytest

from offload.tiers import Split, Tier
from policy_search.cost_model import beside
from policy_search.hardware import Hardware, with_factors
from policy_search.linear_program import PhaseBytes, Problem, Shares, seconds
from policy_search.memory import TierMemory
from policy_search.model_profile import ModelProfile, ModelProfiles, profile_key, seconds_at
from policy_search.model_shape import ModelShape
from policy_search.model_speeds import model_speeds
from policy_search.operators import head_seconds, layer_seconds
from policy_search.policy import Policy
from policy_search.sweep_cost import SweepCost
from policy_search.sweep_load import SweepLoad

SHAPE = ModelShape(
    weight_bytes=1000,
    largest_layer_bytes=400,
    head_bytes=200,
    hidden_size=8,
    widest=32,
    vocab_size=64,
    kv_bytes_per_token=(16, 16),
    value_bytes=2,
    query_values=4,
    flops_per_row=100,
    head_flops_per_row=40,
)
PROFILE = ModelProfile(
    layers=((1, 2.0), (4, 5.0), (16, 20.0)),
    in_place=((1, 1.0), (4, 3.0), (16, 10.0)),
    head=((1, 0.5), (4, 1.0)),
    head_in_place=((1, 0.25), (4, 0.5)),
    program=0.15,
    around=0.1,
    device_attention=64.0,
)
FAST = Hardware(host_to_device=math.inf)


def test_seconds_between_points():
    """Linear in between and beyond, constant below; a single point is in proportion."""
    rows = (0.5, 1, 2.5, 4, 10, 16, 32)
    expected = [2.0, 2.0, 3.5, 5.0, 12.5, 20.0, 40.0]
    assert [seconds_at(PROFILE.layers, n) for n in rows] == pytest.approx(expected)
    assert [seconds_at(((4, 2.0),), n) for n in (1, 4, 10)] == [2.0, 2.0, 5.0]


def test_no_row_is_free_beyond_the_last_point():
    """Even if the last two points are alike: the device needs its time for the operations."""
    alike = ((1, 2.0), (64, 6.0), (128, 6.0))
    assert [seconds_at(alike, n, 0.25) for n in (96, 128, 132, 256)] == [6.0, 6.0, 7.0, 38.0]
    assert seconds_at(PROFILE.layers, 32, 0.25) == 40.0, "which grows by more"
    profile = ModelProfile(layers=alike, in_place=((1, 1.0), (128, 1.0)), head=((1, 3.0), (4, 3.0)))
    hardware = replace(FAST, flops=400.0).profiled(profile)
    assert layer_seconds(SHAPE, hardware, 256, 1) == 38.0
    assert layer_seconds(SHAPE, hardware, 256, 1, in_place=1.0) == pytest.approx(1 + 32 / 6)
    assert head_seconds(SHAPE, hardware, 14, 1) == 3.0 + 10 * 0.1


def test_weights_that_stay_take_what_they_were_measured_to():
    """In part, a part of the difference; where only one way was measured, that one."""
    assert PROFILE.layer_seconds(4, 0.0) == 5.0
    assert PROFILE.layer_seconds(4, 1.0) == 3.0
    assert PROFILE.layer_seconds(4, 0.25) == pytest.approx(5.0 - 0.25 * 2.0)
    assert replace(PROFILE, in_place=()).layer_seconds(4, 1.0) == 5.0
    assert [PROFILE.head_seconds(4, part) for part in (0.0, 0.5, 1.0)] == [1.0, 0.75, 0.5]
    assert replace(PROFILE, head_in_place=()).head_seconds(4, 1.0) == 1.0


def test_each_micro_batch_takes_its_rows_seconds():
    """Layers and head; a micro-batch of prompts has one row in the head, too."""
    measured = FAST.profiled(PROFILE)
    assert layer_seconds(SHAPE, measured, 8, 2) == 2 * 5.0
    assert layer_seconds(SHAPE, measured, 8, 2, in_place=1.0) == 2 * 3.0
    assert layer_seconds(SHAPE, measured, 0, 0) == 0
    assert head_seconds(SHAPE, measured, 8, 2) == 2 * 1.0
    assert head_seconds(SHAPE, measured, 8, 2, in_place=1.0) == 2 * 0.5
    assert head_seconds(SHAPE, measured, 0, 3) == 3 * 0.5
    without = replace(measured, profile=replace(PROFILE, head=()), flops=10.0)
    assert head_seconds(SHAPE, without, 8, 2) == pytest.approx(2 * 4 * 40 / 10)


def test_a_slower_device_takes_longer_for_all_of_it():
    """A run's factor for compute is one of everything that was measured of the model."""
    slow = with_factors(FAST.profiled(PROFILE), {"compute": 2.0})
    assert slow.profile is not None
    assert slow.profile.layer_seconds(4, 0.0) == 10.0
    assert slow.profile.layer_seconds(4, 1.0) == 6.0
    assert slow.profile.head == ((1, 1.0), (4, 2.0))
    assert slow.profile.head_in_place == ((1, 0.5), (4, 1.0))
    assert slow.device_attention == slow.profile.device_attention == 32.0


def test_what_was_not_measured_stays_the_machines():
    """Attention of a model without room to measure it."""
    machine = replace(FAST, attention_flops=7.0, device_attention=3.0)
    found = machine.profiled(PROFILE)
    assert (found.attention_flops, found.device_attention) == (7.0, 64.0)


def sweep(policy, hardware, load):
    """Terms with all pages on the device."""
    memory = {tier: TierMemory(0, int(tier is Tier.DEVICE), 0, 10**9) for tier in Tier}
    return SweepCost(SHAPE, policy, memory, hardware, unified=False).terms(load)


def test_a_sweep_counts_the_program_and_not_as_compute():
    """The device waits for it; half of the weights stay: layers and head are between both ways."""
    load = SweepLoad(rows=4, generating=4, read=8, positions=8, stored=0)
    policy = Policy(weights=Split(device=50, host=50), micro_batch_rows=4, max_rows=4)
    terms = sweep(policy, FAST.profiled(PROFILE), load)
    attending = 8 * 32 / 64.0
    assert terms.busy["compute"] == pytest.approx(4.0 + attending + 0.75)
    assert terms.seconds == pytest.approx(terms.busy["compute"] + 0.25)
    one_by_one = sweep(replace(policy, overlap=False), FAST.profiled(PROFILE), load)
    assert one_by_one.seconds == pytest.approx(terms.seconds)


def fluid(link: float, device: float, hardware: Hardware) -> tuple[float, float]:
    """Both in small steps, each at its speed of the moment: when they end."""
    step, now, left = 1e-4, 0.0, [link, device]
    ends = [0.0, 0.0]
    while max(left) > 0:
        both = min(left) > 0
        rates = (1 - hardware.link_lost, 1 - hardware.compute_lost) if both else (1.0, 1.0)
        now += step
        for number, rate in enumerate(rates):
            if left[number] > 0:
                left[number] -= rate * step
                ends[number] = now
    return ends[0], ends[1]


@pytest.mark.parametrize("seed", range(8))
def test_what_happens_at_the_same_time(seed):
    """As a simulation in small steps finds it, where both together are no slower than in turn."""
    draw = random.Random(seed)
    lost = draw.uniform(0, 0.6)
    hardware = replace(FAST, compute_lost=lost, link_lost=draw.uniform(0, 0.95 - lost))
    link, device = draw.uniform(0.1, 2), draw.uniform(0.1, 2)
    assert beside(link, device, hardware) == pytest.approx(fluid(link, device, hardware), abs=1e-3)


def test_nothing_takes_longer_than_one_after_the_other():
    """Where each loses more than half, and where there is only one of them."""
    hardware = replace(FAST, compute_lost=0.9, link_lost=0.9)
    assert max(beside(2.0, 3.0, hardware)) == 5.0
    assert beside(0.0, 3.0, hardware) == (0.0, 3.0)
    assert beside(2.0, 0.0, hardware) == (2.0, 0.0)
    assert beside(2.0, 3.0, FAST) == (2.0, 3.0)


def test_the_linear_program_knows_what_is_lost():
    """It has the larger of both cases, which is the one that holds."""
    hardware = replace(FAST, host_to_device=100.0, compute_lost=0.5, link_lost=0.2)
    phase = PhaseBytes(1, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    problem = Problem(
        phases=(phase,),
        weights=1000,
        streamed=1000,
        on_disk=0,
        kv=0,
        hidden=0,
        room=dict.fromkeys(Tier, 10**6),
        hardware=hardware,
        unified=False,
    )
    for away in (0.1, 0.3, 0.6, 1.0):
        weights = {Tier.DEVICE: 1 - away, Tier.HOST: away, Tier.DISK: 0.0}
        kv = {Tier.DEVICE: 1.0, Tier.HOST: 0.0, Tier.DISK: 0.0}
        shares = Shares(weights=weights, kv=kv, hidden_on_host=0.0, attended=0.0, seconds=0.0)
        found = seconds(problem, shares)
        assert found == pytest.approx(max(beside(10 * away, 3.0, hardware)), rel=1e-3)


def test_rows_on_their_way_to_host_and_back_are_waited_for():
    """In every layer; where others compute meanwhile, weights before them do not matter."""
    hardware = replace(FAST, host_to_device=1e9, host_attention=1e9, hosted_call=0.01, flops=1e6)
    load = SweepLoad(rows=4, generating=4, read=8, positions=8, stored=0)
    memory = {tier: TierMemory(0, int(tier is Tier.HOST), 0, 10**9) for tier in Tier}
    took = {}
    for batches, call in itertools.product((1, 2), (0.0, 0.01)):
        policy = Policy(attention="host", num_micro_batches=batches)
        machine = replace(hardware, hosted_call=call)
        cost = SweepCost(SHAPE, policy, memory, machine, unified=False)
        took[batches, call] = cost.terms(load).seconds
    for batches in (1, 2):
        more = took[batches, 0.01] - took[batches, 0.0]
        assert more == pytest.approx(batches * SHAPE.num_layers * 0.01)


def test_a_profile_is_kept(tmp_path):
    """By machine and model, in however many bits the model is stored."""
    profiles = ModelProfiles(tmp_path)
    assert profiles.load("machine", SHAPE) is None
    profiles.store("machine", SHAPE, PROFILE)
    packed = replace(
        SHAPE, weight_bytes=300, kv_bytes_per_token=(5, 5), kv_row_bytes=(16, 16), head_bytes=60
    )
    assert ModelProfiles(tmp_path).load("machine", SHAPE) == PROFILE
    assert profiles.load("machine", packed) == PROFILE
    assert profiles.load("other machine", SHAPE) is None
    assert profiles.load("machine", replace(SHAPE, flops_per_row=101)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"layers": [[4, 1.0], [1, 2.0]]},
        {"layers": [[1, 0.0]]},
        {"layers": [[1, "fast"]]},
        {"program": -1.0},
        {"device_attention": 0.0},
        {"layers": [[math.inf, 1.0]]},
        {"layers": [[1, 1.0], [1, 2.0]]},
        {"compute_lost": 1.0},
        {"unknown": 1.0},
    ],
)
def test_a_profile_that_is_none_is_ignored(tmp_path, caplog, change):
    """With a word about it: the next job measures again."""
    profiles = ModelProfiles(tmp_path)
    profiles.store("machine", SHAPE, PROFILE)
    path = tmp_path / "machine.json"
    data = json.loads(path.read_text())
    data["models"][profile_key(SHAPE)] |= change
    path.write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING):
        assert profiles.load("machine", SHAPE) is None
    assert "only a cache" in caplog.text
    other = replace(SHAPE, hidden_size=9)
    profiles.store("machine", other, PROFILE)
    assert profiles.load("machine", other) == PROFILE, "it has no part in that"


def test_what_is_known_of_a_model(monkeypatch, tmp_path):
    """Its profile, and what runs with that profile have corrected: no others."""
    from policy_search import model_records
    from policy_search.corrections import Corrections, model_key

    monkeypatch.setattr(model_records, "cache_dir", lambda: tmp_path)
    Corrections().store("machine", model_key(SHAPE), {"compute": 5.0})
    assert model_speeds(FAST, "machine", SHAPE)[1] == {"compute": 5.0}
    ModelProfiles().store("machine", SHAPE, PROFILE)
    assert model_speeds(FAST, "machine", SHAPE) == (FAST.profiled(PROFILE), {})
    Corrections().store("machine", model_key(SHAPE, profiled=True), {"compute": 2.0})
    found, factors = model_speeds(FAST, "machine", SHAPE)
    assert factors == {"compute": 2.0}
    assert found == with_factors(FAST.profiled(PROFILE), factors)
