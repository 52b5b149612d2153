"""What a model's own layers take on the device: some of them run, with random weights.

A layer is more than its products: norms, rotary embeddings, attention's own overhead, and the code
between them, which in small models takes longer than the products do. So rows go through the
model's code, the executor and the KV cache as they do in a job, and are timed as they are there.
What is told apart are Vidur's operators (MLSys 2024, section 4.2): layers by rows, attention of
single rows, attention of prompts, and the head.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from compression.errors import FlexrunError
from flexrun.attention_calibration import page_bytes
from flexrun.layer_run import LayerRun, Size
from flexrun.link_calibration import LinkCalibration
from flexrun.size_rounds import ATTENDING, PROMPT, SINGLE_ROWS, SizeRounds
from offload.links import Link
from policy_search.model_profile import ModelProfile, Points, seconds_at

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PretrainedConfig

    from flexrun.size_rounds import Measured
    from flexrun.timed_sweep import Timed
    from offload.backend import DeviceBackend
    from policy_search.model_shape import ModelShape

logger = logging.getLogger(__name__)

SECONDS = 30.0
"""For measuring a model, about: a round that has begun is ended."""
_BESIDE_ROWS, _BESIDE_SWEEPS = 16, 5
"""That compute while weights arrive."""
_MOST_LOST = 0.9
_NOISE = 0.05
"""Part of a sweep that is no difference."""
_ROUNDS_PART, _BESIDE_PART = 0.4, 0.05
"""Of the time: for rounds with one kind of weights, and for each measurement of a link."""


def measured_profile(
    config: PretrainedConfig,
    shape: ModelShape,
    dtype: torch.dtype,
    backend: DeviceBackend,
    directory: Path,
    seconds: float = SECONDS,
) -> ModelProfile:
    """Of the model of `config`, whose numbers are `shape`; computed in `dtype`.

    `directory`: the offload directory. Raises `CapacityError` where the device's budget has no room
    for a layer of each kind and what it works with, and whatever the model's code raises.
    """
    with contextlib.ExitStack() as closing, torch.inference_mode():
        run = LayerRun(config, shape, dtype, backend, ATTENDING, closing)
        found = Profiler(run, shape, seconds).profile()
        try:
            compute, link = _lost(run, backend, dtype, directory, _BESIDE_PART * seconds)
        except FlexrunError as error:  # no room for copies, on the device or on disk
            logger.warning("what links and layers lose to each other is not known: %s", error)
            return found
        return replace(found, compute_lost=compute, link_lost=link)


def _lost(
    run: LayerRun, backend: DeviceBackend, dtype: torch.dtype, directory: Path, seconds: float
) -> tuple[float, float]:
    """Parts of their speed that layers, and the link that weights come over, lose to each other.

    Raises `CapacityError` and `OffloadStoreError`.
    """
    link = Link.HOST_TO_DEVICE
    links = [link]
    if backend.unified:
        link = backend.disk_in
        links = [Link.HOST_TO_DISK, link]
    with LinkCalibration(backend, directory, page_bytes(dtype), links) as copies:
        copies.prepare(seconds)
        alone, _ = copies.beside(link, partial(_wait, seconds))
        if not alone:
            return 0.0, 0.0
        computed = _sweep_seconds(run, seconds)
        speed, slower = copies.beside(link, partial(_sweep_seconds, run, seconds))
    return _part(1 - computed / slower), _part(1 - speed / alone)


def _wait(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def _sweep_seconds(run: LayerRun, seconds: float) -> float:
    """The median of sweeps, for as long as `seconds`."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        with run.sequences(_BESIDE_ROWS, 1):
            run.sweep()
            found += [run.sweep().whole for _ in range(_BESIDE_SWEEPS)]
    return statistics.median(found)


def _part(lost: float) -> float:
    return min(_MOST_LOST, max(0.0, lost))


class Profiler:
    """Runs a model's layers in several ways, and tells operators apart."""

    def __init__(
        self, run: LayerRun, shape: ModelShape, seconds: float, held_out: Sequence[Size] = ()
    ) -> None:
        """`seconds`: for all of it, about. Sizes that are `held_out` of the profile are measured
        with its own.
        """
        self._run = run
        self._shape = shape
        self._seconds = seconds
        self._rounds = SizeRounds(run, held_out)
        self.measured: list[Measured] = []
        """With weights as they arrive, and with those in the processor's order if there are any."""

    def profile(self) -> ModelProfile:
        """What can be told without anything else that runs."""
        run, seconds = self._run, _ROUNDS_PART * self._seconds
        run.generating(SINGLE_ROWS[-1], 1, 1)  # whatever compiles
        self.measured = [self._rounds.measure(seconds if run.packs else 2 * seconds)]
        plain, packed = self.measured[0].own, {}
        if run.pack():
            self.measured.append(self._rounds.measure(seconds))
            packed = self.measured[1].own
        chunks = self._chunk_flops(plain)
        singles = self._singles(plain)
        return ModelProfile(
            layers=self._layers(plain, chunks),
            in_place=self._layers(packed, chunks),
            head=self._head(plain),
            head_in_place=self._head(packed) if run.head_packed else (),
            program=statistics.median(each.program for each in singles),
            around=statistics.median(each.around for each in singles),
            device_attention=self._decoding(plain),
            attention_flops=chunks,
        )

    def _singles(self, found: Mapping[Size, Timed]) -> list[Timed]:
        """Those that attend to next to nothing, and have the size's rows."""
        return [found[size] for size in found if size.generating and size.length == 1]

    def _decoding(self, found: Mapping[Size, Timed]) -> float:
        """Bytes per second of single rows' attention: what longer contexts add to the same rows."""
        beside = found[self._rounds.attending]
        alone = found[Size(beside.rows, 1, generating=True)]
        nbytes = (beside.read - alone.read) * sum(self._shape.kv_rows)
        return _rate(nbytes, alone.seconds, beside.seconds)

    def _chunk_flops(self, found: Mapping[Size, Timed]) -> float:
        """Operations per second of prompts' attention: what longer prompts add to about as many
        rows; no limit if there was no time for longer ones.
        """
        prompts = {size: timed for size, timed in found.items() if not size.generating}
        for size, long in prompts.items():
            if size.length > PROMPT:
                short = [each for other, each in prompts.items() if other.length <= PROMPT]
                seconds = seconds_at([(each.rows, each.seconds) for each in short], long.rows)
                seconds *= min(1.0, long.rows / short[0].rows)
                attended = long.rows * short[0].positions / short[0].rows  # of a row, alike in all
                flops = (long.positions - attended) * self._shape.attention_flops
                return _rate(flops, seconds, long.seconds)
        return math.inf

    def _layers(self, found: Mapping[Size, Timed], flops: float) -> Points:
        """Without what prompts' rows attend to, which is priced by itself."""
        each = self._shape.attention_flops / flops
        points = [(one.rows, one.seconds) for one in self._singles(found)]
        points += [
            (one.rows, one.seconds - one.positions * each)
            for size, one in found.items()
            if not size.generating and size.length <= PROMPT
        ]
        return rising(points)

    def _head(self, found: Mapping[Size, Timed]) -> Points:
        """Nothing if it does not run whole."""
        return rising([(s.rows, s.head) for s in self._singles(found) if self._run.whole_head])


def _rate(amount: float, less: float, more: float) -> float:
    """What is done per second of the difference; no limit where that is within the noise."""
    return amount / (more - less) if amount > 0 and more > (1 + _NOISE) * less else math.inf


def rising(points: list[tuple[int, float]]) -> Points:
    """More rows never take less time: where they seem to, neighbours have their mean. Of all rising
    seconds these are the nearest in squares (pool adjacent violators: Ayer et al., 1955).
    """
    kept: list[tuple[int, float]] = []
    pools: list[list[float]] = []
    for rows, seconds in points:
        if seconds <= 0 or (kept and rows <= kept[-1][0]):
            continue
        kept.append((rows, seconds))
        pools.append([seconds])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    means = [statistics.fmean(pool) for pool in pools for _ in pool]
    return tuple((rows, mean) for (rows, _), mean in zip(kept, means))
