"""Facts about the choice of bits: fewer have to be worth it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from offload.errors import CapacityError
from policy_search.bits import COMBINATIONS, BitsRate, choose_bits, combinations
from policy_search.hardware import Hardware
from policy_search.workload import JobLengths


def rates(*known: float | None) -> Callable[[int, int], BitsRate]:
    """Of the combinations in their order; None: no room."""

    def predict(weight_bits: int, kv_bits: int) -> BitsRate:
        rate = known[COMBINATIONS.index((weight_bits, kv_bits))]
        if rate is None:
            raise CapacityError(f"{weight_bits}/{kv_bits} is too large", hint=f"buy {kv_bits}")
        return BitsRate(rate)

    return predict


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ((100, 100, 100, 100, 100, 100), "16/16"),
        ((100, 104, 104, 104, 104, 104), "16/16"),
        ((100, 105, 110, 110, 110, 110), "8/16"),
        ((100, 104, 105, 108, 112, 116), "4/16"),  # 105 by 16/4, 112 of these, and 116 is little
        ((100, 190, 110, 200, 350, 400), "4/4"),
        ((100, 190, 110, 200, 350, 360), "4/16"),
        ((100, 20, 30, 20, 10, 10), "16/16"),
        ((None, 1, None, 1, 1, 1), "8/16"),
        ((None, None, None, None, None, 1), "4/4"),
    ],
)
def test_fewer_bits_have_to_be_faster(known, chosen):
    """By 5 % than what was chosen of those with more bits; what has no room is left out."""
    found = choose_bits(combinations(None, None), rates(*known))
    assert found.chosen.name == chosen
    names = ("16/16", "8/16", "16/4", "8/4", "4/16", "4/4")
    assert found.rates == dict(zip(names, known))


def test_who_has_room_for_the_longest_sequence_comes_first():
    """However fast the others are; where none has it, who has most."""
    room = {(16, 16): 500, (8, 16): 640, (16, 4): 700, (8, 4): 700, (4, 16): 650, (4, 4): 700}
    speed = {(16, 16): 99, (8, 16): 99, (16, 4): 10, (8, 4): 11, (4, 16): 99, (4, 4): 11}
    found = choose_bits(list(room), lambda *bits: BitsRate(speed[bits], room[bits]))
    assert found.chosen.name == "8/4"


def test_what_is_given_is_fixed():
    """Only the other bits are free."""
    assert combinations(16, None) == [(16, 16), (16, 4)]
    assert combinations(None, 4) == [(16, 4), (8, 4), (4, 4)]
    assert combinations(8, 16) == [(8, 16)]
    found = choose_bits(combinations(16, None), rates(1, 9, 2, 9, 9, 9))
    assert found.chosen.name == "16/4"


def test_if_nothing_fits_the_fewest_bits_are_named():
    """With the hint that is about them: they are the last resort."""
    with pytest.raises(CapacityError) as caught:
        choose_bits(combinations(None, None), rates(*[None] * 6))
    assert (
        "16/16 is too large; nor does it fit with the fewest bits (weights in 4"
        in caught.value.message
    )
    assert caught.value.message.endswith("4/4 is too large")
    assert caught.value.hint == "buy 4"
    with pytest.raises(CapacityError, match=r"^8/16 is too large\n"):
        choose_bits(combinations(8, 16), rates(*[None] * 6))


def test_the_choice_is_explained():
    """Every rate, the rule, and what the prediction is for."""
    found = choose_bits(combinations(None, None), rates(None, 12.345678, 0.02, 20, 30, 31))
    text = found.text(JobLengths(7, 10.4, 3), Hardware(host_to_device=2**30, flops=2e12))
    assert text.startswith("bits:    weights in 4 bits, KV cache as computed: ")
    assert "16/16 does not fit, 8/16 12.35, 16/4 0.02, 8/4 20," in text
    assert "5%; 7 sequences of 10 + 3 tokens" in text
    assert text.endswith("link 1.00 GiB/s, products 2 TFLOP/s")
    assert found.as_json(JobLengths(7, 10.5, 3)) == {
        "chosen": "4/16",
        "predicted_tokens_per_second": found.rates,
        "job": {"sequences": 7, "prompt": 10.5, "output": 3},
    }
