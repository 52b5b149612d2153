"""Facts about automatic policies of random models on random machines, tensor by tensor."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import pytest

from offload.errors import CapacityError
from offload.placement import TensorSpec
from offload.tiers import Split, Tier
from policy_search.automatic import ENOUGH_KV, WORTH_A_SLOT, automatic_policy, with_depth
from policy_search.memory import memory_of
from policy_search.model_shape import ModelShape
from policy_search.policy import Policy

MIB = 2**20


def random_shape(draw: random.Random) -> ModelShape:
    """A decoder of 1 to 40 layers; half of them with tied embeddings, half with tensors known."""
    hidden, layers = draw.choice([48, 256, 2048]), draw.randint(1, 40)
    wide, vocab, value = hidden * draw.randint(2, 4), draw.choice([256, 50_000]), 2
    sizes = [hidden * hidden] * 4 + [hidden * wide] * 3 + [hidden] * 2
    tensors = [
        TensorSpec(f"{layer}.{number}", layer, size * value)
        for layer in range(layers)
        for number, size in enumerate(sizes)
    ]
    tensors.append(TensorSpec("head", layers, vocab * hidden * value))
    if draw.random() < 0.5:
        tensors.append(TensorSpec("embedding", -1, vocab * hidden * value))
    return ModelShape(
        weight_bytes=sum(t.nbytes for t in tensors) + hidden * value,
        largest_layer_bytes=sum(sizes) * value,
        head_bytes=vocab * hidden * value,
        hidden_size=hidden,
        widest=wide,
        vocab_size=vocab,
        kv_bytes_per_token=(2 * value * draw.choice([hidden // 4, hidden]),) * layers,
        value_bytes=value,
        tensors=tuple(tensors) if draw.random() < 0.5 else (),
    )


def draw_case(seed: int) -> tuple[ModelShape, dict[Tier, int], Policy, int, bool]:
    draw = random.Random(seed)
    shape = random_shape(draw)

    def limit(lowest: float, highest: float) -> int:
        exact = int(shape.weight_bytes * 10 ** draw.uniform(lowest, highest))
        return draw.choice([exact] * 9 + [0])

    base = Policy(
        micro_batch_rows=draw.choice([1, 16, 512]),
        max_rows=draw.choice([64, 2048]),
        max_sequences=draw.choice([1, 4, 256]),
        page_tokens=draw.choice([1, 16]),
        prefetch_depth=draw.choice([1, 2, 4]),
    )
    limits = {
        Tier.DEVICE: limit(-1, 1),
        Tier.HOST: limit(-1, 1),
        Tier.DISK: limit(-1, 1),
    }
    return shape, limits, base, draw.choice([16, 2048, 131_072]), draw.random() < 0.4


@pytest.mark.parametrize("seed", range(300))
def test_a_plan_fits_every_limit_or_is_refused(seed):
    """Weights, KV cache and working memory of a plan stay below the limit of every tier."""
    shape, limits, base, context, unified = draw_case(seed)
    hints = []
    try:
        policy = automatic_policy(shape, limits, base, context, unified=unified)
    except CapacityError as error:
        hints.append(str(error.hint))
    if hints:
        assert "--" in hints[0]
        return
    memory = memory_of(shape, policy, limits, context, unified=unified)
    assert all(used.free >= 0 for used in memory.values())
    assert sum(used.weights for used in memory.values()) == pytest.approx(shape.weight_bytes)
    assert sum(used.kv for used in memory.values()) > 0
    if unified:
        assert policy.weights.host == policy.kv_cache.host == 0
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("split", ["disk=100", "device=20,host=30,disk=50", "host=100"])
@pytest.mark.parametrize("seed", range(0, 300, 3))
def test_a_given_kv_cache_is_planned_around(seed, split):
    """Where the KV cache goes is kept, and weights leave room for all that it takes."""
    shape, limits, base, context, unified = draw_case(seed)
    kv_cache = Split.parse(split)
    try:
        policy = automatic_policy(shape, limits, base, context, unified=unified, kv_cache=kv_cache)
    except CapacityError:
        return
    assert policy.kv_cache == kv_cache
    memory = memory_of(shape, policy, limits, context, unified=unified)
    assert all(used.free >= 0 for used in memory.values())
    assert all(used.kv > 0 for tier, used in memory.items() if kv_cache.fraction(tier))


def test_machines_with_kv_on_disk_get_a_plan():
    """A third of these tight machines has room for it: the test above is not empty."""
    plans = 0
    for seed in range(100):
        shape, limits, base, context, unified = draw_case(seed)
        with contextlib.suppress(CapacityError):
            arguments = (shape, limits, base, context)
            automatic_policy(*arguments, unified=unified, kv_cache=Split(disk=100))
            plans += 1
    assert plans > 25


def test_most_random_machines_get_a_plan():
    """Refusals are the exception, so the test above is not empty."""
    plans = offloaded = 0
    for seed in range(300):
        shape, limits, base, context, unified = draw_case(seed)
        try:
            policy = automatic_policy(shape, limits, base, context, unified=unified)
        except CapacityError:
            continue
        plans += 1
        offloaded += policy.weights.device < 100
    assert plans > 150
    assert offloaded > 40


@pytest.mark.parametrize("seed", range(100))
def test_kv_gets_a_share_wherever_weights_can_move(seed):
    """With a large HOST, the KV cache has all it wants or a good part of what weights leave."""
    shape, limits, base, context, _ = draw_case(seed)
    limits = {Tier.DEVICE: limits[Tier.DEVICE], Tier.HOST: 10**13, Tier.DISK: 0}
    try:
        policy = automatic_policy(shape, limits, base, context, unified=False)
    except CapacityError:
        return
    memory = memory_of(shape, policy, limits, context, unified=False)
    wanted = base.max_sequences * context * shape.kv_token_bytes
    beside = limits[Tier.DEVICE] - memory[Tier.DEVICE].working
    page = base.page_tokens * shape.kv_token_bytes
    assert sum(used.kv for used in memory.values()) + page >= min(wanted, beside * ENOUGH_KV / 2.1)


def even_shape(layers: int = 8, *, in_place: bool = False) -> ModelShape:
    """Layers of 4 MiB and a head; on DISK, a copy of all weights or the model's own files."""
    tensors = [
        *(TensorSpec(f"{layer}.{part}", layer, MIB) for layer in range(layers) for part in "abcd"),
        TensorSpec("head", layers, 4 * MIB),
    ]
    return ModelShape(
        weight_bytes=sum(t.nbytes for t in tensors),
        largest_layer_bytes=4 * MIB,
        head_bytes=4 * MIB,
        hidden_size=64,
        widest=64,
        vocab_size=100,
        kv_bytes_per_token=(128,) * layers,
        value_bytes=2,
        prepared_bytes=0 if in_place else sum(t.nbytes for t in tensors),
        tensors=tuple(tensors),
    )


@pytest.mark.parametrize("unified", [True, False])
def test_a_model_that_just_fits_is_not_offloaded(unified):
    """Weights stay on the device although the KV cache could fill what is left many times over."""
    limits = {Tier.DEVICE: 43 * MIB, Tier.HOST: 0, Tier.DISK: 0}
    policy = automatic_policy(even_shape(), limits, Policy(), 131_072, unified=unified)
    assert policy.weights == policy.kv_cache == Split(device=100)


def test_a_device_without_room_for_streaming_still_holds_what_fits():
    """No buffers for streamed weights are demanded where no other tier could take weights."""
    limits = {Tier.DEVICE: 40 * MIB, Tier.HOST: 0, Tier.DISK: 0}
    policy = automatic_policy(even_shape(), limits, Policy(max_rows=64), 131_072, unified=False)
    assert policy.weights == Split(device=100)


def test_weights_from_disk_need_buffers_on_host():
    """A HOST too small to pass weights on is refused with the flag that helps."""
    limits = {Tier.DEVICE: 30 * MIB, Tier.HOST: MIB, Tier.DISK: 10**12}
    with pytest.raises(CapacityError, match="missing on host") as caught:
        automatic_policy(even_shape(), limits, Policy(), 2048, unified=False)
    assert "--host-memory" in str(caught.value)


def test_a_disk_that_is_too_small_is_named():
    """What is missing on disk is said, with every flag that helps."""
    limits = {Tier.DEVICE: 20 * MIB, Tier.HOST: 0, Tier.DISK: 35 * MIB}
    with pytest.raises(CapacityError, match="missing on disk") as caught:
        automatic_policy(even_shape(), limits, Policy(), 2048, unified=True)
    assert "--disk-space, or --device-memory" in str(caught.value)


@pytest.mark.parametrize("unified", [True, False])
def test_weights_in_the_models_own_files_need_no_disk_space(unified):
    """A model whose files can be read in place is offloaded to DISK under any budget for it."""
    limits = {Tier.DEVICE: 30 * MIB, Tier.HOST: 36 * MIB, Tier.DISK: 0}
    shape = even_shape(16, in_place=True)
    policy = automatic_policy(shape, limits, Policy(max_rows=64), 2048, unified=unified)
    memory = memory_of(shape, policy, limits, 2048, unified=unified)
    assert memory[Tier.DISK].weights == memory[Tier.DISK].elsewhere > 0
    assert memory[Tier.DISK].free == 0


@pytest.mark.parametrize("disk", [67, 68])
def test_a_prepared_store_holds_all_weights(disk):
    """However few weights are read from it, the disk has to take the whole model."""
    limits = {Tier.DEVICE: 52 * MIB, Tier.HOST: 0, Tier.DISK: disk * MIB}
    shape = even_shape(16)
    if disk < 68:
        with pytest.raises(CapacityError, match="missing on disk"):
            automatic_policy(shape, limits, Policy(), 131_072, unified=True)
        return
    policy = automatic_policy(shape, limits, Policy(), 131_072, unified=True)
    memory = memory_of(shape, policy, limits, 131_072, unified=True)
    assert memory[Tier.DISK].weights > 0
    assert memory[Tier.DISK].free == 0
    assert memory[Tier.DEVICE].kv > 0


def kv_bytes(shape: ModelShape, policy: Policy, limits: dict[Tier, int]) -> int:
    memory = memory_of(shape, policy, limits, 2048, unified=False)
    return sum(tier.kv for tier in memory.values())


@pytest.mark.parametrize("kv_cache", ["device=100", "host=100"])
@pytest.mark.parametrize("room", range(0, 30, 3))
def test_a_third_slot_comes_before_nothing_that_is_needed(kv_cache, room):
    """Depth 3 is chosen where it fits and leaves most of the KV cache; else depth 2."""
    shape = even_shape(in_place=True)
    limits = {Tier.DEVICE: (20 + room) * MIB, Tier.HOST: 200 * MIB, Tier.DISK: 0}
    base = Policy(weights=Split(host=100), kv_cache=Split.parse(kv_cache), max_rows=64)
    policy = with_depth(shape, base, limits, 2048, unified=False)
    try:
        deep = kv_bytes(shape, replace(base, prefetch_depth=3), limits)
    except CapacityError:
        assert policy.prefetch_depth == 2
        return
    flat = kv_bytes(shape, replace(base, prefetch_depth=2), limits)
    assert (policy.prefetch_depth == 3) == (deep >= WORTH_A_SLOT * flat)
    given = replace(base, prefetch_depth=5)
    assert with_depth(shape, given, limits, 2048, unified=False) is given


def test_staging_that_does_not_fit_is_refused():
    """A device too small for the staging of KV pages is refused when it is planned."""
    shape = even_shape(in_place=True)
    base = Policy(weights=Split(host=100), kv_cache=Split(host=100), max_rows=64)

    def what_is_short(kib: int) -> str:
        limits = {Tier.DEVICE: kib * 1024, Tier.HOST: 200 * MIB, Tier.DISK: 0}
        try:
            memory = memory_of(shape, base, limits, 2048, unified=False)
        except CapacityError as error:
            return error.message
        assert memory[Tier.DEVICE].free >= 0
        return ""

    first = next(kib for kib in range(8_000, 64_000, 64) if not what_is_short(kib))
    assert any("staging of KV pages" in what_is_short(kib) for kib in range(first - 64, first))
