"""Facts about which tensor goes to which tier."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from offload.placement import TensorSpec, bytes_per_tier, place
from offload.tiers import Split, Tier


def transformer(layers: int = 24) -> list[TensorSpec]:
    """Tensors with the proportions of a small Llama whose embedding is a fifth of it."""
    sizes = [576, 576, 576 * 576, 192 * 576, 192 * 576, 576 * 576, *[1536 * 576] * 3]
    return [
        *(
            TensorSpec(f"layer{number}.{kind}", number, 4 * size)
            for number in range(layers)
            for kind, size in enumerate(sizes)
        ),
        TensorSpec("head", layers, 4 * 49152 * 576),
    ]


def random_split(draw: random.Random) -> Split:
    cuts = sorted(draw.randint(0, 100) for _ in range(2))
    return Split(device=cuts[0], host=cuts[1] - cuts[0], disk=100 - cuts[1])


@pytest.mark.parametrize("tier", list(Tier))
def test_all_on_one_tier(tier):
    """A split of 100 % puts every tensor on that tier."""
    tensors = transformer()
    tiers = place(tensors, Split(**{tier.value: 100}))
    assert set(tiers.values()) == {tier}
    assert len(tiers) == len(tensors)


@pytest.mark.parametrize("seed", range(30))
def test_equal_tensors_are_off_by_less_than_two(seed):
    """With tensors of one size, every tier is less than two tensors from its share."""
    draw = random.Random(seed)
    split = random_split(draw)
    tensors = [TensorSpec(str(i), i // 8, 1000) for i in range(8 * 30)]
    placed = bytes_per_tier(tensors, place(tensors, split))
    for tier in Tier:
        assert abs(placed[tier] - split.fraction(tier) * 240_000) < 2000
        assert placed[tier] == 0 or split.fraction(tier) > 0


@pytest.mark.parametrize(
    "text", ["device=20,host=80", "device=8,host=12,disk=80", "host=3,disk=97"]
)
def test_shares_of_a_transformer_are_met(text):
    """The shares of a transformer's bytes are within one percent of what was asked."""
    split, tensors = Split.parse(text), transformer()
    placed = bytes_per_tier(tensors, place(tensors, split))
    total = sum(tensor.nbytes for tensor in tensors)
    for tier in Tier:
        assert placed[tier] / total == pytest.approx(split.fraction(tier), abs=0.01)


@pytest.mark.parametrize("percent", [25, 50, 75])
def test_every_layer_gets_an_even_share(percent):
    """No layer streams much more than another, so every layer's transfer hides equally well."""
    layers, largest = 24, 4 * 1536 * 576
    tensors = [t for t in transformer(layers) if t.name != "head"]
    tiers = place(tensors, Split(device=percent, host=100 - percent))
    per_layer: dict[int, int] = defaultdict(int)
    for tensor in tensors:
        if tiers[tensor.name] is Tier.HOST:
            per_layer[tensor.unit] += tensor.nbytes
    whole = sum(tensor.nbytes for tensor in tensors) // layers
    for number in range(layers):
        assert abs(per_layer[number] - whole * (100 - percent) / 100) <= largest


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_tensors_does_not_matter(seed):
    """Placement depends on names, units and sizes, not on the order they are listed in."""
    tensors = transformer()
    expected = place(tensors, Split(device=30, host=30, disk=40))
    shuffled = random.Random(seed).sample(tensors, len(tensors))
    assert place(shuffled, Split(device=30, host=30, disk=40)) == expected
