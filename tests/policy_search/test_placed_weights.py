"""What is said of placed weights, against the placement itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from offload.placement import TensorSpec, place
from offload.tiers import Split, Tier
from policy_search.hardware import Hardware
from policy_search.memory import TierMemory
from policy_search.model_profile import ModelProfile
from policy_search.model_shape import ModelShape
from policy_search.placed_weights import placed_weights
from policy_search.policy import Policy
from policy_search.sweep_cost import SweepCost, in_place
from policy_search.sweep_load import SweepLoad

TENSORS = (
    *(TensorSpec(f"{layer}.{part}", layer, 1000 + layer) for layer in range(4) for part in "abc"),
    TensorSpec("table", -1, 5000),
    TensorSpec("norm", 4, 64),
    TensorSpec("head", 4, 5000),
)
SHAPE = ModelShape(
    weight_bytes=sum(tensor.nbytes for tensor in TENSORS),
    largest_layer_bytes=3 * 1003,
    head_bytes=5064,
    hidden_size=8,
    widest=8,
    vocab_size=100,
    kv_bytes_per_token=(16,) * 4,
    value_bytes=2,
    prepared_bytes=sum(tensor.nbytes for tensor in TENSORS),
    tensors=TENSORS,
)


@pytest.mark.parametrize("unified", [True, False])
def test_parts_that_stay_are_those_of_the_placement(unified):
    """Of layers and of the head each by itself: some splits keep one and not the other."""
    here = {Tier.DEVICE, Tier.HOST} if unified else {Tier.DEVICE}
    seen = set()
    for device in range(0, 101, 5):
        for host in range(0, 101 - device, 5):
            split = Split(device=device, host=host, disk=100 - device - host)
            tiers = place(TENSORS, split)
            found = placed_weights(SHAPE, split, unified=unified)
            for part, units in ((found.in_place, range(4)), (found.head_in_place, [4])):
                sizes = {t.name: t.nbytes for t in TENSORS if t.unit in units}
                stays = sum(n for name, n in sizes.items() if tiers[name] in here)
                assert part == pytest.approx(stays / sum(sizes.values()))
            seen.add((found.in_place == 1, found.head_in_place == 1))
            expected = found.in_place, found.head_in_place
            assert in_place(SHAPE, Policy(weights=split), unified=unified) == expected
    assert len(seen) > 2


def test_a_plain_head_stays_as_it_is_beside_quantized_layers():
    """These are expanded in every sweep wherever they are; a head of fewer bits is, too."""
    policy = Policy(weights=Split(device=100))
    plain = replace(SHAPE, expanded_in_sweep=1, head_flops_per_row=SHAPE.head_bytes, value_bytes=2)
    assert in_place(plain, policy, unified=False) == (0.0, 1.0)
    fewer = replace(plain, head_bytes=plain.head_bytes // 2)
    assert in_place(fewer, policy, unified=False) == (0.0, 0.0)
    assert in_place(plain, Policy(weights=Split(host=100)), unified=False) == (0.0, 0.0)


def test_a_head_that_stays_takes_what_it_was_measured_to():
    """Also where the layers arrive, and the other way round."""
    profile = ModelProfile(
        layers=((1, 8.0),), in_place=((1, 4.0),), head=((1, 2.0),), head_in_place=((1, 1.0),)
    )
    hardware = Hardware(host_to_device=math.inf).profiled(profile)
    memory = {tier: TierMemory(0, int(tier is Tier.DEVICE), 0, 10**9) for tier in Tier}
    load = SweepLoad(rows=1, generating=1, read=0, positions=0, stored=0)
    seen = set()
    for device in range(0, 101, 5):
        policy = Policy(weights=Split(device=device, host=100 - device))
        layers, head = in_place(SHAPE, policy, unified=False)
        terms = SweepCost(SHAPE, policy, memory, hardware, unified=False).terms(load)
        assert terms.busy["compute"] == pytest.approx(8 - 4 * layers + 2 - head)
        seen.add((layers, head))
    assert len({head for _, head in seen}) > 1
    assert any(layers != head for layers, head in seen)
