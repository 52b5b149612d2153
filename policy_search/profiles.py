"""Published measurements of whole machines, as what a sweep takes on them (no torch).

A profile knows nothing of links: all of a sweep's time is the device's. Each comes with its model,
whose keys and values are what crosses the network between machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from policy_search.model_shape import kv_bytes
from policy_search.sweep_load import COMPUTE, SweepTerms

if TYPE_CHECKING:
    from collections.abc import Callable

    from policy_search.sweep_load import SweepLoad


def equivalent_prompt(load: SweepLoad) -> float:
    """Tokens of the one prompt whose attention takes as many operations as all of the sweep's.

    Vidur prices a prefill batch as one of sqrt(sum p^2) tokens (MLSys 2024, section 4.3). A prompt
    of p tokens attends to p (p + 1) / 2 positions, so twice the positions less the rows are p^2,
    and of a chunk what it adds to that.
    """
    rows, positions = load.rows - load.generating, load.positions - load.read
    return math.sqrt(2 * positions - rows)


@dataclass(frozen=True, slots=True)
class AffineCost:
    """DistServe's fits (OSDI 2024; its simulator, simdistserve), which are in milliseconds.

    A sweep with prompts and generating rows takes the time of both, one after the other: DistServe
    computes them in turns. Pipelines of one stage.
    """

    prefill: tuple[float, float, float]
    """Constant, for each token of prompts, and for each squared length of one."""
    small: tuple[float, float, float]
    """Constant, for each position that is attended to, and for each sequence that generates, …"""
    large: tuple[float, float, float]
    """… and the same for batches of at least `boundary` sequences."""
    boundary: int = 95
    overhead: tuple[float, float] = (2.0, 1e-4)
    """Of every sweep, and for each token of its prompts and of what its generating sequences attend
    to: of the worker that starts it.
    """
    stage: float = 1.0
    """Of a sweep with prompts, for each stage of its pipeline."""

    def __call__(self, load: SweepLoad) -> SweepTerms:
        """A sweep's time."""
        prompts = load.rows - load.generating
        worker = self.overhead[0] + self.overhead[1] * (prompts + load.read)
        worker += self.stage * bool(prompts)
        device = self.prefill_ms(load) + self.decode_ms(load)
        return SweepTerms((device + worker) / 1000, {COMPUTE: device / 1000})

    def prefill_ms(self, load: SweepLoad) -> float:
        """Of the prompts in a sweep."""
        rows = load.rows - load.generating
        if not rows:
            return 0.0
        constant, per_token, per_square = self.prefill
        return constant + per_token * rows + per_square * equivalent_prompt(load) ** 2

    def decode_ms(self, load: SweepLoad) -> float:
        """Of the sequences that generate in a sweep."""
        if not load.generating:
            return 0.0
        fit = self.small if load.generating < self.boundary else self.large
        constant, per_position, per_sequence = fit
        return constant + per_position * load.read + per_sequence * load.generating


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """Splitwise's medians (ISCA 2024; the measurements of its simulator), in milliseconds.

    A batch of prompts takes what one prompt of all their tokens does, between measured lengths in
    proportion, and likewise beyond them. With sequences that generate in the same sweep, all rows
    together take 1.1 times what prompts of so many would (both as in its simulator). Generating is
    known for one sequence: any number is taken to need as long, which is too little for many.
    """

    prompts: tuple[tuple[int, float], ...]
    """Tokens, rising, and how long their prompt takes."""
    token: float
    """A sweep of sequences that generate."""
    mixed: float = 1.1

    def __call__(self, load: SweepLoad) -> SweepTerms:
        """A sweep's time."""
        if load.generating == load.rows:
            seconds = self.token / 1000
        else:
            slower = self.mixed if load.generating else 1.0
            seconds = slower * self.prompt_ms(load.rows) / 1000
        return SweepTerms(seconds, {COMPUTE: seconds})

    def prompt_ms(self, tokens: float) -> float:
        """Of prompts with so many tokens."""
        pairs = list(pairwise(self.prompts))
        below, above = next((pair for pair in pairs if tokens <= pair[1][0]), pairs[-1])
        slope = (above[1] - below[1]) / (above[0] - below[0])
        return below[1] + slope * (tokens - below[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A machine with a model on it."""

    model: str
    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    """All of the model's published config.json; values have 16 bits."""
    cost: Callable[[SweepLoad], SweepTerms]
    source: str
    devices: int = 1
    """GPUs that it has."""

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token, in all layers."""
        return self.layers * kv_bytes(self, None, value_bytes=2)


def _opt_13b(devices: int, cost: AffineCost, engine: str = "DistServe") -> Profile:
    return Profile(
        model="OPT-13B",
        layers=40,
        kv_heads=40,
        key_dim=128,
        value_dim=128,
        cost=cost,
        source=f"DistServe's fit of {engine} on A100s, tensor parallelism {devices} (simdistserve)",
        devices=devices,
    )


PROFILES = {
    "opt-13b-a100": _opt_13b(
        1,
        AffineCost(
            prefill=(18.1025, 0.101912, 7.1223e-6),
            small=(19.9347, 6.2694e-4, 0.038507),
            large=(7.1662, 5.7980e-4, 0.158311),
        ),
    ),
    "opt-13b-a100-vllm": _opt_13b(
        1,
        AffineCost(
            prefill=(23.6274, 0.150546, 8.6535e-6),
            small=(19.5625, 4.9411e-4, 0.050606),
            large=(16.8386, 4.3898e-4, 0.140003),
        ),
        engine="vLLM",
    ),
    "opt-13b-2xa100": _opt_13b(
        2,
        AffineCost(
            prefill=(14.7430, 0.0685772, 2.4496e-6),
            small=(13.2948, 3.4109e-4, 0.062964),
            large=(10.6387, 3.1183e-4, 0.085629),
        ),
    ),
    "opt-13b-4xa100": _opt_13b(
        4,
        AffineCost(
            prefill=(12.0623, 0.0380814, 5.2262e-7),
            small=(10.2562, 1.8787e-4, 0.032693),
            large=(10.4835, 1.7121e-4, 0.045666),
        ),
    ),
    "llama2-70b-h100": Profile(
        model="Llama-2-70B",
        layers=80,
        kv_heads=8,
        key_dim=128,
        value_dim=128,
        cost=MeasuredCost(
            prompts=((512, 53.9), (1024, 77.9), (2048, 136.8), (4096, 390.0), (8192, 845.0)),
            token=31.05,
        ),
        source="Splitwise's measurements on eight H100, tensor parallelism 8, batch size 1",
        devices=8,
    ),
    "llama2-70b-a100": Profile(
        model="Llama-2-70B",
        layers=80,
        kv_heads=8,
        key_dim=128,
        value_dim=128,
        cost=MeasuredCost(
            prompts=((512, 93.0), (1024, 154.0), (2048, 274.0), (4096, 661.0), (8192, 1550.0)),
            token=45.0,
        ),
        source="Splitwise's measurements on eight A100, tensor parallelism 8, batch size 1",
        devices=8,
    ),
}
