"""Facts about the automatic policy: it fits, and it uses the fastest tier that there is."""

from __future__ import annotations

import random

import pytest

from offload.errors import CapacityError
from offload.tiers import DISK_BLOCK, REQUEST_BYTES, STAGING_BUFFERS, Split, Tier
from policy_search.automatic import SMALLEST_DEPTH, automatic_policy
from policy_search.kv_memory import kv_pages
from policy_search.memory import workspace
from policy_search.model_shape import ModelShape
from policy_search.policy import Policy

GIB = 2**30


def random_shape(draw: random.Random) -> ModelShape:
    """A decoder with 4 to 80 layers, in bfloat16."""
    hidden, layers = draw.choice([256, 1024, 4096]), draw.randint(4, 80)
    wide, vocab = hidden * draw.randint(2, 4), draw.choice([8_000, 128_000])
    layer = 2 * (4 * hidden * hidden + 3 * hidden * wide)
    return ModelShape(
        weight_bytes=layers * layer + 2 * vocab * hidden,
        largest_layer_bytes=layer,
        head_bytes=2 * vocab * hidden,
        hidden_size=hidden,
        widest=wide,
        vocab_size=vocab,
        kv_bytes_per_token=(2 * 2 * draw.choice([hidden // 4, hidden]),) * layers,
        value_bytes=2,
    )


def device_bytes(shape: ModelShape, policy: Policy) -> int:
    """DEVICE bytes of weights, their working memory and activations under `policy`."""
    streamed = policy.weights.device < 100
    ring = shape.working_bytes(policy.depth) if streamed else 0
    weights = int(shape.weight_bytes * policy.weights.fraction(Tier.DEVICE))
    return weights + ring + workspace(shape, policy)


def draw_case(seed: int) -> tuple[ModelShape, dict[Tier, int], Policy, bool]:
    draw = random.Random(seed)
    shape = random_shape(draw)
    limits = {
        Tier.DEVICE: int(shape.weight_bytes * 10 ** draw.uniform(-1.5, 0.5)),
        Tier.HOST: int(shape.weight_bytes * 10 ** draw.uniform(-2, 0.7)),
        Tier.DISK: 10**13,
    }
    base = Policy(
        micro_batch_rows=draw.choice([16, 512]),
        max_rows=draw.choice([64, 2048]),
        max_sequences=draw.choice([4, 256]),
    )
    return shape, limits, base, draw.random() < 0.3


@pytest.mark.parametrize("seed", range(100))
def test_no_limit_is_exceeded(seed):
    """What an automatic policy puts on DEVICE and HOST, KV cache included, fits their limits."""
    shape, limits, base, unified = draw_case(seed)
    try:
        policy = automatic_policy(shape, limits, base, 2048, unified=unified)
    except CapacityError:
        on_device = shape.working_bytes(SMALLEST_DEPTH) + workspace(shape, base)
        # Weights on DISK pass through a few small buffers on HOST.
        staging = STAGING_BUFFERS * REQUEST_BYTES
        assert on_device > limits[Tier.DEVICE] or (not unified and staging > limits[Tier.HOST])
        return
    used = {
        Tier.DEVICE: device_bytes(shape, policy),
        Tier.HOST: int(shape.weight_bytes * policy.weights.fraction(Tier.HOST)),
    }
    room = {tier: limits[tier] - nbytes for tier, nbytes in used.items()}
    assert min(room.values()) >= 0
    try:
        pages = kv_pages(shape, policy, room, 2048)
    except CapacityError:
        # Honest: HOST has to take the KV cache and is smaller than one page beside its weights.
        page = shape.kv_token_bytes * policy.page_tokens
        assert not policy.kv_cache.device
        assert limits[Tier.HOST] * 0.5 < page
        return
    for tier, left in room.items():
        assert pages[tier] * policy.page_tokens * shape.kv_token_bytes <= left
    assert sum(pages.values()) > 0


def test_what_fits_stays_on_the_device():
    """A model with its KV cache that fits on DEVICE is not offloaded."""
    shape = random_shape(random.Random(0))
    limits = {Tier.DEVICE: 100 * shape.weight_bytes, Tier.HOST: 0, Tier.DISK: 0}
    policy = automatic_policy(shape, limits, Policy(), 2048, unified=False)
    assert (policy.weights, policy.kv_cache) == (Split(device=100), Split(device=100))


SHAPE = ModelShape(
    weight_bytes=100 * GIB,
    largest_layer_bytes=GIB,
    head_bytes=GIB,
    hidden_size=8192,
    widest=28672,
    vocab_size=128_000,
    kv_bytes_per_token=(4096,) * 80,
    value_bytes=2,
)


@pytest.mark.parametrize(
    ("device", "host", "weights"),
    [
        (200, 64, "device=100"),
        (30, 200, "device=12.86,host=87.14"),
        (30, 50, "device=12.86,host=49.93,disk=37.21"),
        (30, 5, "device=12.86,host=4.93,disk=82.21"),
        (5, 64, "device=0.69,host=31.89,disk=67.42"),  # HOST has to hold the KV cache as well
    ],
)
def test_faster_tiers_are_filled_first(device, host, weights):
    """Weights go to DEVICE while it lasts, then to HOST, and only the rest to DISK."""
    limits = {Tier.DEVICE: device * GIB, Tier.HOST: host * GIB, Tier.DISK: 1000 * GIB}
    policy = automatic_policy(SHAPE, limits, Policy(), 4096, unified=False)
    assert policy.weights == Split.parse(weights)
    assert policy.kv_cache == (Split(host=100) if device == 5 else Split(device=100))


def test_on_a_cpu_nothing_goes_to_host():
    """Where DEVICE is RAM already, what does not fit goes to DISK."""
    limits = {Tier.DEVICE: 30 * GIB, Tier.HOST: 200 * GIB, Tier.DISK: 1000 * GIB}
    policy = automatic_policy(SHAPE, limits, Policy(), 4096, unified=True)
    assert policy.weights.host == policy.kv_cache.host == 0
    assert policy.weights.disk > 50


def test_a_device_too_small_for_one_layer_is_refused():
    """Without room for the working memory the missing bytes and the flags are named."""
    limits = {Tier.DEVICE: 3 * GIB, Tier.HOST: 64 * GIB, Tier.DISK: 1000 * GIB}
    with pytest.raises(CapacityError, match="MiB is missing") as caught:
        automatic_policy(SHAPE, limits, Policy(), 4096, unified=False)
    assert "--device-memory" in str(caught.value)


@pytest.mark.parametrize(
    ("kv_cache", "device_room", "host_room", "expected"),
    [
        ("device=100", 10, 99, {Tier.DEVICE: 10, Tier.HOST: 0}),
        ("host=100", 99, 10, {Tier.DEVICE: 0, Tier.HOST: 10}),
        ("device=50,host=50", 10, 99, {Tier.DEVICE: 10, Tier.HOST: 10}),
        ("device=25,host=75", 10, 12, {Tier.DEVICE: 4, Tier.HOST: 12}),
        ("device=100", 10**6, 0, {Tier.DEVICE: 256 * 4, Tier.HOST: 0}),
        ("device=25,disk=75", 10, 0, {Tier.DEVICE: 10, Tier.HOST: 0, Tier.DISK: 30}),
        ("host=50,disk=50", 0, 99, {Tier.DEVICE: 0, Tier.HOST: 50, Tier.DISK: 50}),
    ],
)
def test_kv_pages_follow_the_split_and_the_room(kv_cache, device_room, host_room, expected):
    """The scarcer tier decides, and no more pages are made than all sequences can fill."""
    policy = Policy(kv_cache=Split.parse(kv_cache), page_tokens=16)
    page = SHAPE.kv_token_bytes * policy.page_tokens
    room = {Tier.DEVICE: device_room * page, Tier.HOST: host_room * page + 1}
    room[Tier.DISK] = 50 * page + SHAPE.num_layers * DISK_BLOCK
    pages = kv_pages(SHAPE, policy, room, context_length=64)
    assert pages == {Tier.DISK: 0} | expected


@pytest.mark.parametrize("kv_cache", ["device=100", "host=100", "disk=100"])
def test_no_room_for_a_page_is_refused(kv_cache):
    """A tier that cannot hold one page is named, with what is left and the flags that help."""
    room = {Tier.DEVICE: 1000, Tier.HOST: 1000, Tier.DISK: 1000 + SHAPE.num_layers * DISK_BLOCK}
    policy = Policy(kv_cache=Split.parse(kv_cache))
    with pytest.raises(
        CapacityError, match=f"no room for the KV cache on {kv_cache[:-4]}"
    ) as caught:
        kv_pages(SHAPE, policy, room, 64)
    assert "1000 B is left" in str(caught.value)
    assert "--kv-cache" in str(caught.value)
