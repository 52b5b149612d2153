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
from flexrun.layer_run import LayerRun
from flexrun.link_calibration import LinkCalibration
from offload.links import Link
from policy_search.model_profile import ModelProfile, Points

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

    from flexrun.timed_sweep import Timed
    from offload.backend import DeviceBackend
    from policy_search.model_shape import ModelShape

logger = logging.getLogger(__name__)

SECONDS = 15.0
"""For measuring a model, about: a sweep that has begun is ended."""
_SINGLE_ROWS = (1, 4, 16, 32, 64)
"""Sequences that generate, a row each."""
_PROMPT = 128
"""Rows of each prompt, of which as many are computed as more rows need."""
_CONTEXT = 512
"""Positions that are attended to where attention is measured."""
_SEQUENCES = 8
_FEW, _MANY = 5, 9
"""Times that a sweep is repeated; the median counts."""
_BESIDE_ROWS = 16
"""That compute while weights arrive."""
_MOST_LOST = 0.9
_NOISE = 0.05
"""Part of a sweep that is no difference."""
_POINTS_PART, _CONTEXT_PART, _BESIDE_PART = 0.35, 0.15, 0.05
"""Of the time: for the points of one kind of weights, for the positions to attend to, and for each
measurement of a link."""


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
        run = LayerRun(config, shape, dtype, backend, (_SEQUENCES, _CONTEXT), closing)
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
            found += [run.sweep().whole for _ in range(_FEW)]
    return statistics.median(found)


def _part(lost: float) -> float:
    return min(_MOST_LOST, max(0.0, lost))


class Profiler:
    """Runs a model's layers in several ways, and tells operators apart."""

    def __init__(self, run: LayerRun, shape: ModelShape, seconds: float) -> None:
        """`seconds`: for all of it, about."""
        self._run = run
        self._shape = shape
        self._seconds = seconds

    def profile(self) -> ModelProfile:
        """What can be told without anything else that runs."""
        self._run.generating(_SINGLE_ROWS[-1], 1, 1)  # whatever compiles
        plain = self._points()
        decoding, chunks = self._attention(*plain)
        packed = self._points() if self._run.pack() else ([], [])
        singles, _ = plain
        return ModelProfile(
            layers=self._layers(*plain, chunks),
            in_place=self._layers(*packed, chunks),
            head=_rising([(s.rows, s.head) for s in singles]) if self._run.whole_head else (),
            program=statistics.median(each.program for each in singles),
            around=statistics.median(each.around for each in singles),
            device_attention=decoding,
            attention_flops=chunks,
        )

    def _points(self) -> tuple[list[Timed], list[Timed]]:
        """Single rows, and prompts, as many as there is time for but one size at least."""
        run, start = self._run, time.perf_counter()
        singles = [run.generating(rows, 1, _FEW) for rows in _SINGLE_ROWS]
        prompts: list[Timed] = []
        last = singles[-1]
        for rows in run.prompt_rows:
            left = _POINTS_PART * self._seconds - (time.perf_counter() - start)
            if prompts and (_FEW + 1) * last.wall * rows / last.rows > left:
                break
            last = run.prompts(max(1, rows // _PROMPT), min(rows, _PROMPT, run.context), _FEW)
            prompts.append(last)
        return singles, prompts

    def _attention(self, singles: list[Timed], prompts: list[Timed]) -> tuple[float, float]:
        """Bytes and operations per second: what longer contexts add to the same rows."""
        run = self._run
        dearest = (prompts or singles)[-1]
        of_context = run.context * dearest.wall / dearest.rows
        affordable = int(_CONTEXT_PART * self._seconds / of_context)
        count = max(1, min(run.sequences_at_once, affordable))
        alone = run.generating(count, 1, _MANY)
        beside = run.generating(count, run.context, _MANY)
        nbytes = (beside.read - alone.read) * sum(self._shape.kv_rows)
        decoding = _rate(nbytes, alone.seconds, beside.seconds)
        if not prompts or run.context <= _PROMPT:
            return decoding, math.inf
        return decoding, self._chunk_flops(prompts[-1])

    def _chunk_flops(self, short: Timed) -> float:
        """Of long prompts, against about as many rows of short ones."""
        length = min(self._run.context, short.rows)
        long = self._run.prompts(max(1, short.rows // length), length, _FEW)
        same = long.rows / short.rows
        flops = (long.positions - same * short.positions) * self._shape.attention_flops
        return _rate(flops, same * short.seconds, long.seconds)

    def _layers(self, singles: list[Timed], prompts: list[Timed], flops: float) -> Points:
        """Without what prompts' rows attend to, which is priced by itself."""
        each = self._shape.attention_flops / flops
        points = [(one.rows, one.seconds) for one in singles]
        points += [(one.rows, one.seconds - one.positions * each) for one in prompts]
        return _rising(points)


def _rate(amount: float, less: float, more: float) -> float:
    """What is done per second of the difference; no limit where that is within the noise."""
    return amount / (more - less) if amount > 0 and more > (1 + _NOISE) * less else math.inf


def _rising(points: list[tuple[int, float]]) -> Points:
    """More rows, which never take less time."""
    found: list[tuple[int, float]] = []
    for rows, seconds in points:
        least = found[-1][1] if found else 0.0
        if seconds > 0 and (not found or rows > found[-1][0]):
            found.append((rows, max(least, seconds)))
    return tuple(found)
