"""Facts about the memory of a KV cache whose full pages are stored in groups of few bits."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from compression.spec import GroupFormat
from offload.errors import CapacityError
from offload.tiers import (
    BROKEN_OFF,
    DISK_BLOCK,
    LEAVING_BATCHES,
    PACKED_PAGES,
    REQUEST_BYTES,
    STAGING_BUFFERS,
    Split,
    Tier,
)
from policy_search.automatic import automatic_policy
from policy_search.kv_memory import (
    broken_off_bytes,
    embedding_rows,
    hosted_row_bytes,
    kv_file_bytes,
    kv_room,
    kv_working,
    leaving_rows_bytes,
    packed_working,
    packing_bytes,
    recent_pages_bytes,
)
from policy_search.memory import default_max_sequences, memory_of, workspace
from policy_search.model_shape import ModelShape, kv_bytes
from policy_search.policy import Policy

MIB, GIB = 2**20, 2**30
PLAIN = ModelShape(
    weight_bytes=16 * GIB,
    largest_layer_bytes=GIB // 2,
    head_bytes=GIB // 2,
    hidden_size=4096,
    widest=14336,
    vocab_size=128_256,
    kv_bytes_per_token=(4096,) * 32,
    value_bytes=2,
    query_values=4096,
    output_values=32 * 129,
)
"""About Llama 3 with 8 billion parameters, in 16 bits."""
PACKED = replace(PLAIN, kv_bytes_per_token=(1152,) * 32, kv_row_bytes=(4096,) * 32)
POLICY = Policy(max_sequences=10, page_tokens=32, micro_batch_rows=64, max_rows=256)


@dataclass(frozen=True)
class Layer:
    kv_heads: int
    key_dim: int
    value_dim: int


@pytest.mark.parametrize(
    ("layer", "group", "value_bytes", "packed", "plain"),
    [
        # 64 bytes of codes and two groups with two numbers of 16 bits: 4.5 bits per value.
        (Layer(8, 128, 128), 64, 2, 8 * 2 * (64 + 8), 4096),
        (Layer(8, 128, 128), 64, 4, 1152, 8192),
        (Layer(8, 128, 128), 32, 2, 8 * 2 * (64 + 16), 4096),
        (Layer(8, 128, 128), 128, 2, 8 * 2 * (64 + 4), 4096),
        # Keys and values of two sizes; the last group of 80 values is short.
        (Layer(16, 192, 128), 64, 2, 16 * (96 + 12 + 64 + 8), 16 * 320 * 2),
        (Layer(4, 80, 80), 64, 2, 4 * 2 * (40 + 8), 4 * 160 * 2),
    ],
)
def test_bytes_of_one_token(layer, group, value_bytes, packed, plain):
    """As they follow from the format, by hand."""
    assert kv_bytes(layer, GroupFormat(4, group), value_bytes) == packed
    assert kv_bytes(layer, None, value_bytes) == plain


def test_a_llama_keeps_more_than_three_times_the_tokens():
    """Exactly 4.5 of 16 bits are stored."""
    assert PACKED.kv_token_bytes * 16 == PLAIN.kv_token_bytes * 4.5
    assert PACKED.kv_rows == PLAIN.kv_rows == PLAIN.kv_bytes_per_token
    assert (PACKED.kv_packed, PLAIN.kv_packed) == (True, False)


def test_attention_expands_what_it_gathers():
    """A copy of the packed bytes and one of the values; plain pages are copied once."""
    without = [shape.workspace_bytes(64, 256, 1, 0) for shape in (PLAIN, PACKED)]
    gathered = [shape.workspace_bytes(64, 256, 1, 1000) for shape in (PLAIN, PACKED)]
    assert gathered[0] - without[0] == 1000 * 4096
    assert gathered[1] - without[1] == 1000 * (4096 + 1152)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("kv_cache", ["device=100", "host=100", "disk=100"])
def test_the_newest_pages_are_on_the_device(kv_cache, unified):
    """Two of every sequence and layer, as they are computed, with the room to pack pages."""
    policy = replace(POLICY, kv_cache=Split.parse(kv_cache))
    recent, packing = (2 * 32 + 1) * 10 * 32 * 4096, PACKED_PAGES * 32 * (5 * 4096 + 1152)
    assert recent_pages_bytes(PACKED, policy) == recent
    assert packing_bytes(PACKED, policy) == packing
    assert recent_pages_bytes(PLAIN, policy) == packing_bytes(PLAIN, policy) == 0
    free = dict.fromkeys(Tier, 40 * GIB)
    room, staging = kv_room(PACKED, policy, free, 8192, unified=unified)
    working = kv_working(PACKED, policy, staging, unified)
    assert working[Tier.DEVICE] >= recent + packing
    assert room[Tier.DEVICE] == free[Tier.DEVICE] - working[Tier.DEVICE]
    if kv_cache == "device=100":
        assert working == {Tier.DEVICE: recent + packing, Tier.HOST: 0}


def test_memory_of_the_device_has_the_newest_pages():
    """Working memory is larger by them, pages take fewer bytes, and more of them fit."""
    limits = {Tier.DEVICE: 24 * GIB, Tier.HOST: 0, Tier.DISK: 0}
    policy = replace(POLICY, max_sequences=64)
    plain, packed = (
        memory_of(shape, policy, limits, 131_072, unified=False)[Tier.DEVICE]
        for shape in (PLAIN, PACKED)
    )
    activations = workspace(PACKED, policy) - workspace(PLAIN, policy)
    more = packed_working(PACKED, policy, unified=False) + activations
    assert packed.working - plain.working == more
    tokens = [plain.kv // PLAIN.kv_token_bytes, packed.kv // PACKED.kv_token_bytes]
    assert tokens[1] > 3 * tokens[0]
    assert packed.kv <= plain.kv


@pytest.mark.parametrize("unified", [True, False])
def test_pages_on_disk_have_no_other_tails(unified):
    """The newest pages take the place of those that wait in RAM until they are full."""
    policy = replace(POLICY, kv_cache=Split(disk=100))
    packed = kv_working(PACKED, policy, 4, unified)
    assert packed[Tier.HOST] == (0 if unified else 4 * 4 * 32 * 1152)
    plain = kv_working(PLAIN, policy, 4, unified)
    tails = 10 * 32 * PLAIN.kv_token_bytes
    assert plain[Tier.HOST] == (0 if unified else 4 * 4 * 32 * 4096 + tails)


@pytest.mark.parametrize("unified", [True, False])
def test_staging_leaves_room_for_the_newest_pages(unified):
    """Its buffers take half of what these leave of a small device, or all if no others live there:
    as many pages as are in it.
    """
    for kv_cache, most in (("disk=100", 1.0), ("device=50,disk=50", 0.5)):
        policy = replace(POLICY, kv_cache=Split.parse(kv_cache))
        for extra in (MIB, 64 * MIB):  # besides what packed pages need
            device = packed_working(PACKED, policy, unified=unified) + extra
            free = {Tier.DEVICE: device, Tier.HOST: GIB, Tier.DISK: 100 * GIB}
            room, staging = kv_room(PACKED, policy, free, 131_072, unified=unified)
            assert staging == int(extra * most) // (2 * 32 * 1152)
            assert kv_working(PACKED, policy, staging, unified)[Tier.DEVICE] <= device
            assert room[Tier.DEVICE] >= 0


@pytest.mark.parametrize(
    ("kv_cache", "most"), [("host=100", None), ("disk=100", 1.0), ("host=50,disk=50", 0.5)]
)
def test_staging_leaves_room_for_pages_in_ram(kv_cache, most):
    """A device with much room is of no use to a machine whose RAM the buffers would fill: where all
    pages are there, a sequence has to fit into both; where none is, all of it may be buffers.
    """
    policy = replace(POLICY, kv_cache=Split.parse(kv_cache))
    free = {Tier.DEVICE: 40 * GIB, Tier.HOST: 200 * MIB, Tier.DISK: 40 * GIB}
    room, staging = kv_room(PLAIN, policy, free, 131_072, unified=False)
    takes, besides = (kv_working(PLAIN, policy, n, unified=False)[Tier.HOST] for n in (staging, 0))
    there = 200 * MIB - embedding_rows(PLAIN, policy, unified=False)
    assert room[Tier.HOST] == there - takes
    one_more = (takes - besides) / staging
    if most is None:
        pages = room[Tier.HOST] // (PLAIN.kv_token_bytes * 32)
        assert staging <= pages <= staging + 1
    else:
        left = most * (there - besides) - (takes - besides)
        assert 0 <= left < one_more


def test_packed_pages_leave_whole():
    """Wherever they go from a separate device; plain rows leave for HOST only, one by one."""
    pages = LEAVING_BATCHES * PACKED_PAGES * 32 * 1152
    for kv_cache, packed, plain in [
        ("device=100", 0, 0),
        ("host=100", pages, LEAVING_BATCHES * 64 * 4096),
        ("device=50,disk=50", pages, 0),
    ]:
        policy = replace(POLICY, kv_cache=Split.parse(kv_cache))
        assert leaving_rows_bytes(PACKED, policy, unified=False) == packed
        assert leaving_rows_bytes(PLAIN, policy, unified=False) == plain
        on_disk = pages if policy.kv_cache.disk else 0
        assert leaving_rows_bytes(PACKED, policy, unified=True) == on_disk
        assert leaving_rows_bytes(PLAIN, policy, unified=True) == 0


def test_rows_that_attend_on_host_take_only_queries_there():
    """New keys and values are on the device until their page is full."""
    back, query = 4 * 32 * 129, 2 * 4096
    assert hosted_row_bytes(PACKED) == {Tier.DEVICE: back, Tier.HOST: back + query}
    assert hosted_row_bytes(PLAIN) == {Tier.DEVICE: back, Tier.HOST: back + query + 4096}
    rows = BROKEN_OFF * 64
    assert broken_off_bytes(PLAIN, POLICY) == rows * (2 * (query + 4096) + 2 * back)
    assert broken_off_bytes(PACKED, POLICY) == rows * (2 * query + 4096 + 2 * back)


def test_the_file_on_disk_has_packed_pages():
    """Pages of a layer are neighbours; each layer's start a block."""
    layer_bytes = -(-7 * 32 * 1152 // DISK_BLOCK) * DISK_BLOCK
    assert kv_file_bytes(PACKED, POLICY, 7) == 32 * layer_bytes


def test_too_many_sequences_for_the_device_are_named():
    """Where it is the newest pages that do not fit, the hint has the flag that makes them fewer."""
    limits = {Tier.DEVICE: 19 * GIB, Tier.HOST: 64 * GIB, Tier.DISK: 0}
    for kv_cache in (Split(device=100), Split(host=100)):
        policy = replace(POLICY, max_sequences=1000, kv_cache=kv_cache)
        with pytest.raises(CapacityError) as caught:
            memory_of(PACKED, policy, limits, 8192, unified=False)
        assert "--max-sequences" in str(caught.value.hint)
        fewer = replace(policy, max_sequences=8)
        assert memory_of(PACKED, fewer, limits, 8192, unified=False)[Tier.DEVICE].free >= 0


@pytest.mark.parametrize("seed", range(100))
def test_an_automatic_plan_fits_wherever_kv_goes(seed):
    """Every limit is kept, and what is refused has no room for working memory."""
    draw = random.Random(seed)
    unified = draw.random() < 0.4
    limits = {
        Tier.DEVICE: int(PACKED.weight_bytes * 10 ** draw.uniform(-1, 0.5)),
        Tier.HOST: int(PACKED.weight_bytes * 10 ** draw.uniform(-1, 0.7)),
        Tier.DISK: 10**13,
    }
    given = draw.choice([None, Split(host=100), Split(disk=100), Split(device=50, disk=50)])
    base = Policy(max_sequences=draw.choice([1, 32, 256]), prefetch_depth=2)
    try:
        policy = automatic_policy(PACKED, limits, base, 8192, unified=unified, kv_cache=given)
    except CapacityError:
        least = PACKED.working_bytes(2) + packed_working(PACKED, base, unified=unified)
        assert limits[Tier.DEVICE] < 2 * least or limits[Tier.HOST] < STAGING_BUFFERS * (
            REQUEST_BYTES + PACKED.largest_layer_bytes
        )
        return
    memory = memory_of(PACKED, policy, limits, 8192, unified=unified)
    assert all(used.free >= 0 for used in memory.values())
    assert sum(used.kv for used in memory.values()) > 0
    assert memory[Tier.DEVICE].working >= packed_working(PACKED, policy, unified=unified)


def test_by_default_no_more_sequences_run_than_the_device_has_pages_for():
    """Their first and newest pages take an eighth of it; plain pages are no limit."""
    assert default_max_sequences(PLAIN, 14 * GIB) == Policy().max_sequences
    one = recent_pages_bytes(PACKED, replace(POLICY, max_sequences=1))
    found = default_max_sequences(PACKED, 14 * GIB)
    assert found * one <= 14 * GIB / 8 < (found + 1) * one
    assert default_max_sequences(PACKED, 1000 * GIB) == Policy().max_sequences
    assert default_max_sequences(PACKED, MIB) == 1
