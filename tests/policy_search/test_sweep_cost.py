"""Seconds of every resource in a sweep, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from offload.tiers import Split, Tier
from policy_search.hardware import Hardware, with_factors
from policy_search.memory import TierMemory
from policy_search.model_shape import ModelShape
from policy_search.operators import attention_seconds, head_seconds, layer_seconds
from policy_search.policy import Policy
from policy_search.sweep_cost import SweepCost, micro_batches
from policy_search.sweep_load import SweepLoad

SHAPE = ModelShape(
    weight_bytes=1000,
    largest_layer_bytes=500,
    head_bytes=100,
    hidden_size=5,
    widest=8,
    vocab_size=16,
    kv_bytes_per_token=(3, 3),
    value_bytes=2,
    query_values=4,
    output_values=6,
    flops_per_row=100,
    head_flops_per_row=40,
)
FAST = Hardware(host_to_device=math.inf)
GENERATING = SweepLoad(rows=10, generating=10, read=50, positions=50, stored=0)
PROMPTS = SweepLoad(rows=20, generating=0, read=0, positions=100, stored=30)


def busy(load: SweepLoad, policy: Policy, unified: bool = False, **speeds: Any) -> dict[str, float]:
    """What is not 0, of a machine with a byte and an operation per second where it says so."""
    kv = {tier: int(1e6 * policy.kv_cache.fraction(tier)) for tier in Tier}
    memory = {tier: TierMemory(0, kv[tier], 0, 10**9) for tier in Tier}
    hardware = replace(FAST, **speeds)
    cost = SweepCost(SHAPE, policy, memory, hardware, unified=unified)
    return {name: each for name, each in cost.terms(load).busy.items() if each}


ONE: dict[str, Any] = dict.fromkeys(
    ["host_to_device", "device_to_host", "disk_read", "disk_write"], 1.0
)


def test_weights_cross_links() -> None:
    """Half of them from RAM, a quarter from disk, which cross the link to the device, too."""
    policy = Policy(weights=Split(device=25, host=50, disk=25))
    assert busy(GENERATING, policy, **ONE) == {"host->device": 750, "disk->host": 250}
    assert busy(GENERATING, policy, unified=True, **ONE) == {"disk->device": 250}


def test_pages_in_ram_move_or_are_attended_to_there() -> None:
    """Of 50 positions 300 bytes; new ones leave, of ten rows 60 bytes. Attention there gets each
    row's query, key and value in both layers, 8 + 3 bytes, and gives 24 back.
    """
    moved = Policy(kv_cache=Split(host=100), attention="device")
    assert busy(GENERATING, moved, **ONE) == {"host->device": 300, "device->host": 60}
    there = replace(moved, attention="host")
    found = busy(GENERATING, there, host_attention=2.0, **ONE)
    assert found == {
        "host->device": 10 * 2 * 24,
        "device->host": 60 + 10 * 2 * 11,
        "host attention": 150,
    }


def test_prompts_move_what_was_stored_before() -> None:
    """Thirty positions of earlier sweeps, wherever attention of single rows is."""
    policy = Policy(kv_cache=Split(host=100), attention="host")
    assert busy(PROMPTS, policy, **ONE) == {"host->device": 180, "device->host": 120}


def test_pages_on_disk_are_read_and_written() -> None:
    """By way of RAM; on a CPU at once."""
    policy = Policy(kv_cache=Split(disk=100))
    pages = 300 + 300 / (3 * 32) * 1e-4  # of each layer and 32 tokens one, a tenth of a millisecond
    assert busy(GENERATING, policy, **ONE) == {
        "disk->host": pytest.approx(pages, rel=1e-9),
        "host->device": 300,
        "device->host": 60,
        "host->disk": 60,
    }
    found = busy(GENERATING, policy, unified=True, **ONE)
    assert found == {"disk->device": pytest.approx(pages, rel=1e-9), "host->disk": 60}


def test_hidden_states_leave_and_come_back() -> None:
    """Ten rows of five values of two bytes in both layers."""
    policy = Policy(activations=Split(device=50, host=50))
    assert busy(GENERATING, policy, **ONE) == {"host->device": 100, "device->host": 100}


def test_links_meet_in_ram() -> None:
    """A sweep takes as long as all bytes together, if that is longer than each link."""
    memory = {tier: TierMemory(0, int(tier is Tier.DEVICE), 0, 10**9) for tier in Tier}
    policy = Policy(weights=Split(host=50, disk=50))
    hardware = replace(FAST, host_to_device=10.0, disk_read=5.0, links_together=12.0)
    cost = SweepCost(SHAPE, policy, memory, hardware, unified=False)
    assert cost.terms(GENERATING).seconds == pytest.approx(1500 / 12)
    wide = SweepCost(SHAPE, policy, memory, replace(hardware, links_together=20), unified=False)
    assert wide.terms(GENERATING).seconds == pytest.approx(100)


def test_one_micro_batch_waits_for_its_attention() -> None:
    """Two can take turns on the device and on the processor."""
    policy = Policy(kv_cache=Split(host=100), attention="host")
    memory = {tier: TierMemory(0, int(tier is Tier.HOST), 0, 10**9) for tier in Tier}
    hardware = replace(FAST, host_attention=1.0, flops=10.0)
    one = SweepCost(SHAPE, policy, memory, hardware, unified=False).terms(GENERATING)
    assert one.busy["compute"] + one.busy["host attention"] == one.seconds
    both = replace(policy, num_micro_batches=2)
    two = SweepCost(SHAPE, both, memory, hardware, unified=False).terms(GENERATING)
    assert two.seconds < one.seconds
    assert [micro_batches(each, 10) for each in (policy, both)] == [1, 2]
    assert micro_batches(replace(both, micro_batch_rows=3), 10) == 4
    assert micro_batches(both, 1) == 1


def test_products_by_rows() -> None:
    """As measured: linear between points and in proportion beyond; each micro-batch by itself."""
    measured = replace(FAST, products=((2, 10.0), (4, 40.0)))
    assert layer_seconds(SHAPE, measured, 2, 1) == pytest.approx(200 / 10)
    assert layer_seconds(SHAPE, measured, 1, 1) == pytest.approx(200 / 10)  # matrices are read
    assert layer_seconds(SHAPE, measured, 4, 1) == pytest.approx(400 / 40)
    assert layer_seconds(SHAPE, measured, 4, 2) == pytest.approx(2 * 200 / 10)
    assert layer_seconds(SHAPE, measured, 40, 1) == pytest.approx(4000 / 40)
    between = (200 / 10 + 400 / 40) / 2
    assert layer_seconds(SHAPE, measured, 3, 1) == pytest.approx(between)
    assert head_seconds(SHAPE, measured, 4, 1) == pytest.approx(4 * 40 / 40)
    assert layer_seconds(SHAPE, measured, 0, 1) == head_seconds(SHAPE, measured, 0, 0) == 0


def test_attention_reads_or_computes() -> None:
    """Single rows read their pages; prompts' rows multiply, at the rate of attention."""
    flops = 4 * 4 * 2  # of a row and a position in both layers
    hardware = replace(FAST, device_attention=3.0, attention_flops=8.0)
    assert attention_seconds(SHAPE, hardware, 50, 300, 0) == 100
    assert attention_seconds(SHAPE, hardware, 0, 0, 100) == 100 * flops / 8
    assert attention_seconds(SHAPE, replace(FAST, flops=16.0), 50, 300, 100) == 150 * flops / 16


def test_factors_of_earlier_runs() -> None:
    """What a resource does takes as many times as long."""
    policy = Policy(weights=Split(disk=100))
    speeds = replace(FAST, **ONE, flops=100.0, products=((1, 100.0),))
    factors = {"disk->host": 2.0, "host->device": 3.0, "compute": 4.0}
    memory = {tier: TierMemory(0, int(tier is Tier.DEVICE), 0, 10**9) for tier in Tier}
    before, after = (
        SweepCost(SHAPE, policy, memory, each, unified=False).terms(GENERATING)
        for each in (speeds, with_factors(speeds, factors))
    )
    for name, factor in factors.items():
        assert after.busy[name] == pytest.approx(factor * before.busy[name])
    assert after.seconds == pytest.approx(max(after.busy.values()))


def test_rows_that_compute_in_a_time() -> None:
    """Weights are expanded in each sweep, 60 bytes at 2 a second, and one row of each micro-batch
    of eight has logits, 40 operations; a row's products are 100. Or each micro-batch reads the
    layers' matrices, 100 bytes, and the head's, 40, however many rows it has.
    """
    shape = replace(SHAPE, expanded_in_sweep=60)
    memory = {tier: TierMemory(0, 0, 0, 10**9) for tier in Tier}
    policy = Policy(micro_batch_rows=8, max_rows=100)
    expanding = replace(FAST, expansion=2.0, flops=1.0)
    for hardware, seconds, rows in (
        (expanding, 30 + 2 * 40 + 1000, 10),
        (expanding, 30 + 2 * 40 + 999, 9),
        (expanding, 60, 0),
        (replace(FAST, matrix_read=1.0), 3 * 140, 24),
        (FAST, 0, 100),
    ):
        cost = SweepCost(shape, policy, memory, hardware, unified=False)
        assert cost.rows_within(seconds) == rows
