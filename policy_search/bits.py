"""How many bits weights and KV cache get where the planner may choose them (no torch).

Fewer bits move and take less memory, and cost quality and the time to expand weights. So each
combination is planned and its speed predicted, and fewer bits have to be worth it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from compression.selection import PLAIN_BITS
from offload.errors import CapacityError
from offload.tiers import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from policy_search.hardware import Hardware
    from policy_search.workload import JobLengths

WORTH_FEWER_BITS = 0.05
"""Part of the predicted speed that fewer bits have to add."""
COMBINATIONS = ((16, 16), (8, 16), (16, 4), (8, 4), (4, 16), (4, 4))
"""Bits of weights and of the KV cache, from what changes results least to what changes them most:
weights in 8 bits hardly do, those in 4 do most in models that were not made for it."""
CHOSEN = ("weight_bits", "kv_bits")
"""The fields of a policy that are chosen."""


class BitsRate(NamedTuple):
    """How good a plan with some bits is."""

    rate: float
    """Generated tokens per second."""
    room_for: int = 0
    """Tokens of the longest sequence that it has room for, as far as the job needs that."""


@dataclass(frozen=True, slots=True)
class BitsPlan:
    """One combination, and what it is predicted to do."""

    weight_bits: int
    kv_bits: int
    rate: float = 0.0
    """As in `BitsRate`; the next one, too."""
    room_for: int = 0
    shortage: CapacityError | None = None
    """Why it does not fit, if it does not."""

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{self.weight_bits}/{self.kv_bits}"


@dataclass(frozen=True, slots=True)
class BitsChoice:
    """The plan that was chosen, and those that it was chosen from."""

    plans: tuple[BitsPlan, ...]
    chosen: BitsPlan

    @property
    def rates(self) -> dict[str, float | None]:
        """Predicted tokens per second by the bits of weights and KV cache; None: no room."""
        return {p.name: None if p.shortage else round(p.rate, 3) for p in self.plans}

    def text(self, job: JobLengths, hardware: Hardware) -> str:
        """What was chosen and why, in a few lines."""
        rates = ", ".join(f"{p.name} {_rate(p)}" for p in self.plans)
        tokens = f"{job.prompt:.0f} + {job.output:.0f} tokens"
        return (
            f"bits:    {bits_in_words(self.chosen.weight_bits, self.chosen.kv_bits)}: "
            "--allow-quantization lets the plan choose\n"
            f"         predicted tokens/s by bits of weights/KV cache: {rates}\n"
            f"         (fewer have to add {WORTH_FEWER_BITS:.0%}; {job.sequences} sequences of "
            f"{tokens})\n"
            f"         {_speeds(hardware)}"
        )

    def as_json(self, job: JobLengths) -> dict[str, Any]:
        """The same for programs."""
        sizes = {"sequences": job.sequences, "prompt": job.prompt, "output": job.output}
        return {"chosen": self.chosen.name, "predicted_tokens_per_second": self.rates, "job": sizes}


def bits_in_words(weight_bits: int, kv_bits: int) -> str:
    """As people are told: 16 stands for no change, whatever a checkpoint stores."""
    weights = "as stored" if weight_bits == PLAIN_BITS else f"in {weight_bits} bits"
    cache = "as computed" if kv_bits == PLAIN_BITS else f"in {kv_bits} bits"
    return f"weights {weights}, KV cache {cache}"


def combinations(weight_bits: int | None, kv_bits: int | None) -> list[tuple[int, int]]:
    """Bits of weights and KV cache to consider, the most first; what is given is fixed."""
    return [
        pair
        for pair in COMBINATIONS
        if weight_bits in (None, pair[0]) and kv_bits in (None, pair[1])
    ]


def choose_bits(
    considered: list[tuple[int, int]], predict: Callable[[int, int], BitsRate]
) -> BitsChoice:
    """The fastest of the `considered` bits, where those that come later have to be worth it.

    `predict` says how good they are or raises `CapacityError`. Of those with room for the longest
    sequences, from the most bits to the fewest, one takes the place of what was chosen before it if
    it is faster by `WORTH_FEWER_BITS`. Raises `CapacityError` if nothing fits.
    """
    plans = tuple(_plan(*pair, predict) for pair in considered)
    fitting = [plan for plan in plans if plan.shortage is None]
    if not fitting:
        raise _nothing_fits(plans)
    longest = max(plan.room_for for plan in fitting)
    fitting = [plan for plan in fitting if plan.room_for == longest]
    chosen = fitting[0]
    for plan in fitting[1:]:
        if plan.rate >= (1 + WORTH_FEWER_BITS) * chosen.rate:
            chosen = plan
    return BitsChoice(plans, chosen)


def _plan(weight_bits: int, kv_bits: int, predict: Callable[[int, int], BitsRate]) -> BitsPlan:
    try:
        return BitsPlan(weight_bits, kv_bits, *predict(weight_bits, kv_bits))
    except CapacityError as error:
        return BitsPlan(weight_bits, kv_bits, shortage=error)


def _nothing_fits(plans: tuple[BitsPlan, ...]) -> CapacityError:
    most, fewest = plans[0].shortage, plans[-1].shortage
    assert most is not None
    assert fewest is not None
    if most is fewest:
        return most
    bits = bits_in_words(plans[-1].weight_bits, plans[-1].kv_bits)
    return CapacityError(
        f"{most.message}; nor does it fit with the fewest bits ({bits}): {fewest.message}",
        hint=fewest.hint,
    )


def _rate(plan: BitsPlan) -> str:
    return "does not fit" if plan.shortage is not None else f"{plan.rate:.4g}"


def _speeds(hardware: Hardware) -> str:
    """What the prediction depends on, but for what is not limited."""
    named = {
        "link": hardware.host_to_device,
        "disk": hardware.disk_read,
        "attention on host": hardware.host_attention,
        "expansion": hardware.expansion,
        "matrices": hardware.matrix_read,
    }
    parts = [f"{name} {format_size(v)}/s" for name, v in named.items() if v != math.inf]
    unit, name = (1e12, "T") if hardware.flops >= 1e12 else (1e9, "G")
    return ", ".join([*parts, f"products {hardware.flops / unit:.3g} {name}FLOP/s"])
