"""Facts about predicted throughput, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.placement import TensorSpec
from offload.tiers import Split, Tier
from policy_search.hardware import Hardware
from policy_search.memory import TierMemory
from policy_search.model_shape import ModelShape
from policy_search.policy import Policy
from policy_search.sweep_cost import streamed_bytes
from policy_search.throughput import predict
from policy_search.workload import JobLengths, Lengths

SHAPE = ModelShape(
    weight_bytes=1000,
    largest_layer_bytes=500,
    head_bytes=100,
    hidden_size=4,
    widest=8,
    vocab_size=16,
    kv_bytes_per_token=(1, 1),
    value_bytes=2,
    flops_per_row=10,
)
POLICY = Policy(weights=Split(host=100), max_rows=100, max_sequences=8, page_tokens=1)
JOB = JobLengths(8, 20, 10)
LINK = Hardware(host_to_device=100.0, flops=1e9)


def rate(policy=POLICY, job=JOB, hardware=LINK, shape=SHAPE, *, unified=False, **kv: int) -> float:
    kv = kv or {"device": 10**6}
    memory = {tier: TierMemory(0, kv.get(tier.value, 0), 0, 10**9) for tier in Tier}
    found = predict(shape, policy, memory, job, hardware, unified=unified)
    return found.tokens_per_second


def test_a_sweep_takes_as_long_as_its_weights() -> None:
    """Eight sequences: two sweeps of prompts and ten that generate, of 10 seconds each."""
    assert rate() == pytest.approx(80 / 120, rel=1e-3)
    disk = replace(POLICY, weights=Split(disk=100))
    slow_disk = replace(LINK, disk_read=50.0)
    assert rate(disk, hardware=slow_disk) == pytest.approx(80 / 240, rel=1e-3)
    assert rate(disk, hardware=slow_disk, unified=True) == pytest.approx(80 / 240, rel=1e-3)
    assert rate(unified=True) > 1000  # weights on HOST are where they are computed with


def test_a_job_without_prompts_has_a_rate() -> None:
    """A context of one token leaves none of a prompt."""
    assert rate(job=JobLengths(8, 20, 10).within(1)) > 0


def test_rows_and_expansion_take_time() -> None:
    """A thousand operations a second: prompts of 80 rows take 0.8 s, a token of all 0.08."""
    here = replace(POLICY, weights=Split(device=100))
    slow = Hardware(host_to_device=100.0, flops=1000.0)
    assert rate(here, hardware=slow) == pytest.approx(80 / (1.6 + 0.8), rel=1e-6)
    shape = replace(SHAPE, expanded_in_sweep=30)
    slow = replace(slow, expansion=60.0)
    assert rate(here, hardware=slow, shape=shape) == pytest.approx(80 / (2.4 + 6), rel=1e-6)
    # Beside the weights' 10 seconds all of it is free, …
    assert rate(hardware=slow, shape=shape) == pytest.approx(80 / 120, rel=1e-3)
    # … unless transfers and compute follow each other.
    one_by_one = replace(POLICY, overlap=False)
    assert rate(one_by_one, hardware=slow, shape=shape) == pytest.approx(80 / 128.4, rel=1e-6)


def test_few_rows_take_as_long_as_matrices_are_read() -> None:
    """Five weights of two bytes that a row meets: a second a micro-batch, and two of the head."""
    here = replace(POLICY, weights=Split(device=100))
    slow = Hardware(host_to_device=100.0, matrix_read=10.0, flops=1e9)
    assert rate(here, hardware=slow) == pytest.approx(80 / 12, rel=1e-6)
    in_two = replace(here, micro_batch_rows=4)  # generating; prompts of 80 rows in 20
    assert rate(in_two, hardware=slow) == pytest.approx(80 / (40 + 20), rel=1e-6)
    head = replace(SHAPE, head_flops_per_row=20)  # in sweeps of prompts, too: see `Executor`
    assert rate(here, hardware=slow, shape=head) == pytest.approx(80 / 36, rel=1e-6)
    # Beside weights that take longer to arrive it is free.
    assert rate(hardware=slow, shape=head) == pytest.approx(80 / 120, rel=1e-3)


def test_a_large_job_takes_places_in_turn() -> None:
    """Of 800 sequences eight run: prompts of the others ride in the thousand sweeps."""
    many = replace(JOB, sequences=800)
    assert rate(job=many) == pytest.approx(8000 / 10020, rel=1e-3)
    # With 20 rows a sweep, 23 840 rows besides the first 160 take 1 192 sweeps.
    few_rows = replace(POLICY, max_rows=20)
    assert rate(few_rows, many) == pytest.approx(8000 / 12000, rel=1e-3)


def test_keys_and_values_bound_what_runs() -> None:
    """Room for two sequences, which have 26.5 tokens in the mean, takes four times as long."""
    room = 2 * 53
    many = replace(JOB, sequences=8000)
    fewer = rate(job=many, device=room)
    assert fewer == pytest.approx(rate(job=many) / 4, rel=1e-3)
    half = replace(SHAPE, kv_bytes_per_token=(1,))
    assert rate(job=many, shape=half, device=room) == pytest.approx(2 * fewer, rel=1e-3)


def test_sequences_that_are_too_long_do_not_count() -> None:
    """Room for a third of a mean one: of these a third is served, one after the other."""
    third = JobLengths(8, 20 / 3, 10 / 3)
    assert rate(device=2 * 10) == pytest.approx(rate(job=third, device=2 * 10) / 3)
    assert rate(device=2 * 29) == pytest.approx(rate(device=2 * 30), rel=0.1)
    assert rate(device=2 * 29) < rate(device=2 * 30)


def test_pages_cross_the_link() -> None:
    """Those on HOST move, or the processor attends to them; those on DISK are read."""
    here = replace(POLICY, weights=Split(device=100), kv_cache=Split(host=100))
    slow = replace(LINK, host_attention=200.0)
    moved, attended = (replace(here, attention=each) for each in ("device", "host"))
    pages = 8 * 25 * 2  # bytes a sweep
    assert rate(moved, hardware=slow, host=10**6) == pytest.approx(80 / (10 * pages / 100), 1e-3)
    assert rate(attended, hardware=slow, host=10**6) == pytest.approx(80 / (10 * pages / 200), 1e-3)
    both = rate(here, hardware=slow, host=10**6)
    assert both == pytest.approx(80 / (10 * pages / 300), 1e-2)
    disk = replace(LINK, disk_read=50.0)
    assert rate(moved, hardware=disk, disk=10**6) == pytest.approx(80 / (10 * pages / 50), 1e-2)


def test_only_rows_of_an_embedding_table_are_read() -> None:
    """A table of its own streams nothing, wherever it is."""
    tensors = (
        TensorSpec("table", -1, 300),
        TensorSpec("layer", 0, 500),
        TensorSpec("head", 1, 200),
    )
    shape = replace(SHAPE, tensors=tensors)
    assert streamed_bytes(shape, POLICY, unified=False) == (700, 0)
    assert streamed_bytes(shape, POLICY, unified=True) == (0, 0)
    disk = replace(POLICY, weights=Split(disk=100))
    assert streamed_bytes(shape, disk, unified=True) == (700, 700)
    assert streamed_bytes(SHAPE, disk, unified=False) == (1000, 1000)


def test_the_last_sequences_leave_places_empty() -> None:
    """By hand: twelve sequences in eight places are two blocks of ten tokens, not one and a half;
    where the longest has 30, 0.6 of the difference comes on top, and the rest of it as far as all
    begin together, one in 1.5 blocks; and blocks end at all times.
    """
    twelve = replace(JOB, sequences=12)
    assert rate(job=twelve) == pytest.approx(120 / (20 + 200), rel=1e-3)
    longer = replace(twelve, longest=30)
    last = 0.5 * 10 * (10 / 30) ** 2 + (0.6 + 0.4 / 1.5) * 20
    assert rate(job=longer) == pytest.approx(120 / (20 + 10 * (15 + last)), rel=1e-3)


def test_a_job_in_a_few_numbers() -> None:
    """Means and the longest, cut where the model's context ends."""
    job = JobLengths.of([Lengths(10, 2), Lengths(20, 5)])
    assert job == JobLengths(2, 15.0, 3.5, 5, prompts=(10, 20), most_tokens=25)
    assert job.within(17) == JobLengths(2, 15.0, 2.0, 2.0, prompts=(10, 16), most_tokens=17)
    assert job.within(8) == JobLengths(2, 7, 1, 1, prompts=(7, 7), most_tokens=8)
