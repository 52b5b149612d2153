"""Facts about the time that a sweep is predicted to take."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from policy_search.cost_model import (
    SweepWork,
    best_host_share,
    busy_seconds,
    free_rows,
    sweep_seconds,
)
from policy_search.hardware import Hardware
from policy_search.model_shape import ModelShape
from policy_search.operators import expansion_seconds

SHAPE = ModelShape(
    weight_bytes=40,
    largest_layer_bytes=30,
    head_bytes=10,
    hidden_size=4,
    widest=8,
    vocab_size=16,
    kv_bytes_per_token=(8,),
    value_bytes=2,
)


def cases() -> list[tuple[SweepWork, Hardware]]:
    draw = random.Random(0)
    return [
        (
            SweepWork(
                weights=draw.choice([0, draw.randint(1, 10**11)]), host_kv=draw.randint(1, 10**11)
            ),
            Hardware(
                host_to_device=draw.uniform(1e9, 6e10), host_attention=draw.uniform(1e9, 2e11)
            ),
        )
        for _ in range(200)
    ]


@pytest.mark.parametrize(("work", "hardware"), cases())
def test_no_share_is_much_faster_than_the_best(work: SweepWork, hardware: Hardware) -> None:
    share = best_host_share(work, hardware)
    assert 0 <= share <= 1
    best = sweep_seconds(work, hardware, share)
    for other in range(101):
        assert best <= sweep_seconds(work, hardware, other / 100) * 1.18  # 1 / 0.85
    if share not in (0, 1):
        busy = busy_seconds(work, hardware, share)
        assert busy["host->device"] == pytest.approx(busy["host attention"])


def test_link_and_processor_take_as_long() -> None:
    """By hand: 30 GB of pages and no weights, a link of 10 and a processor of 20 GB/s."""
    work = SweepWork(weights=0, host_kv=30 * 10**9)
    hardware = Hardware(host_to_device=10e9, host_attention=20e9)
    assert best_host_share(work, hardware) == pytest.approx(2 / 3)
    busy = busy_seconds(work, hardware, 2 / 3)
    assert busy == {
        "host->device": pytest.approx(1.0),
        "host attention": pytest.approx(1.0),
        "compute": 0.0,
    }


def test_the_busiest_resource_takes_as_long_as_the_sweep() -> None:
    work = SweepWork(weights=10**9, host_kv=10**9, compute=3.0)
    hardware = Hardware(host_to_device=1e9, host_attention=1e9)
    assert sweep_seconds(work, hardware, 0.0) == 3.0
    assert sweep_seconds(work, Hardware(host_to_device=1e8, host_attention=1e9), 1.0) == 10.0


def test_what_compute_and_attention_take_from_each_other() -> None:
    """By hand: of 2 s of attention and 4 of compute, each at 80 % while both work.

    After 2.5 s attention is over, and compute has done 2 of its 4 seconds' work: 4.5 s in all.
    """
    work = SweepWork(weights=0, host_kv=2 * 10**9, compute=4.0)
    hardware = Hardware(host_to_device=1e9, host_attention=1e9, contention=0.2)
    assert sweep_seconds(work, hardware, 1.0) == pytest.approx(4.5)
    assert sweep_seconds(work, hardware, 0.0) == 4.0  # the link does not compute


def test_a_pipeline_is_filled_and_drained() -> None:
    """By hand: ten stages of 0.1 s of the link, 0.2 of attention and 0.3 of compute.

    The first stage's compute begins after 0.3 s; then one of 0.3 s follows the other.
    """
    work = SweepWork(weights=10**9, host_kv=2 * 10**9, compute=3.0, stages=10)
    hardware = Hardware(host_to_device=1e9, host_attention=1e9)
    assert sweep_seconds(work, hardware, 1.0) == pytest.approx(0.3 + 10 * 0.3)
    longer = replace(work, around=0.5)
    assert sweep_seconds(longer, hardware, 1.0) == pytest.approx(0.5 + 0.3 + 10 * 0.3)


def test_a_slow_link_waits_for_the_rest_of_the_last_stage() -> None:
    """By hand: ten stages of 0.5 s of the link, 0.2 of attention and 0.3 of compute."""
    work = SweepWork(weights=5 * 10**9, host_kv=2 * 10**9, compute=3.0, stages=10)
    hardware = Hardware(host_to_device=1e9, host_attention=1e9)
    assert sweep_seconds(work, hardware, 1.0) == pytest.approx(10 * 0.5 + 0.2 + 0.3)
    # With 2.5 s around the layers the device takes longer: it waits for the link once.
    longer = replace(work, around=2.5)
    assert sweep_seconds(longer, hardware, 1.0) == pytest.approx(2.5 + 3.0 + 0.2 + 0.5)


def test_pages_travel_while_there_are_layers() -> None:
    """By hand: 4 s of pages, and 1 s in which nobody attends; weights could travel in that."""
    work = SweepWork(weights=0, host_kv=4 * 10**9, compute=1.0, around=1.0)
    hardware = Hardware(host_to_device=1e9)
    assert sweep_seconds(work, hardware, 0.0) == 5.0
    assert sweep_seconds(replace(work, weights=10**9), hardware, 0.0) == 5.0
    assert sweep_seconds(replace(work, weights=2 * 10**9), hardware, 0.0) == 6.0


def test_a_split_that_saves_little_is_none() -> None:
    """A processor or a link that is ten times as fast as the other does it alone."""
    work = SweepWork(weights=0, host_kv=10**9)
    assert best_host_share(work, Hardware(host_to_device=1e9, host_attention=1e10)) == 1.0
    assert best_host_share(work, Hardware(host_to_device=1e10, host_attention=1e9)) == 0.0


def test_expansion_takes_of_the_time_that_rows_have() -> None:
    """Weights of 40 bytes, expanded at 10 a second, leave 6 of 10 seconds, and no rows of 3."""
    shape = replace(SHAPE, expanded_in_sweep=40, flops_per_row=2)
    hardware = Hardware(host_to_device=1.0, expansion=10.0, flops=100.0)
    assert expansion_seconds(shape, hardware) == 4.0
    assert free_rows(shape, hardware, 10.0) == 300.0
    assert free_rows(shape, hardware, 3.0) == 0.0
    assert free_rows(replace(shape, expanded_in_sweep=0), hardware, 3.0) == 150.0


def test_without_pages_on_host_there_is_nothing_to_share() -> None:
    hardware = Hardware(host_to_device=1e9, host_attention=1e9)
    assert best_host_share(SweepWork(weights=5, host_kv=0), hardware) == 0.0
