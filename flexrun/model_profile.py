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
from typing import TYPE_CHECKING

import torch

from flexrun.attention_calibration import page_bytes
from flexrun.layer_run import LayerRun, Timed
from flexrun.link_calibration import LinkCalibration
from flexrun.measuring import median_of
from offload.errors import CapacityError
from offload.links import Link
from policy_search.model_profile import ModelProfile, Points

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

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
) -> ModelProfile | None:
    """Of the model of `config`, whose numbers are `shape`; computed in `dtype`.

    `directory`: the offload directory. None where the device's budget has no room for a layer of
    each kind and what it works with. Raises `OffloadStoreError`.
    """
    with contextlib.ExitStack() as closing, torch.inference_mode():
        try:
            run = LayerRun(config, shape, dtype, backend, (_SEQUENCES, _CONTEXT), closing)
        except CapacityError as error:
            logger.debug("the model is not profiled: %s", error.message)
            return None
        found = _Profiler(run, shape, seconds).profile()
        compute, link = _lost(run, backend, dtype, directory, seconds)
        return replace(found, compute_lost=compute, link_lost=link)


def _lost(
    run: LayerRun, backend: DeviceBackend, dtype: torch.dtype, directory: Path, seconds: float
) -> tuple[float, float]:
    """Parts of their speed that layers, and the link that weights come over, lose to each other."""
    link, each = Link.HOST_TO_DEVICE, _BESIDE_PART * seconds
    links = [link]
    if backend.unified:
        link = backend.disk_in
        links = [Link.HOST_TO_DISK, link]

    def sweeps() -> float:
        return median_of(lambda _: run.sweep().whole, each)

    with LinkCalibration(backend, directory, page_bytes(dtype), links) as copies:
        copies.prepare(each)
        alone = next(iter(copies.alone(link, each).values()))
        with run.sequences(_BESIDE_ROWS, 1):
            run.sweep()
            computed = sweeps()
            speed, slower = copies.beside(link, sweeps)
    if not speed:
        return 0.0, 0.0
    return _part(1 - computed / slower), _part(1 - speed / alone)


def _part(lost: float) -> float:
    return min(_MOST_LOST, max(0.0, lost))


class _Profiler:
    def __init__(self, run: LayerRun, shape: ModelShape, seconds: float) -> None:
        self._run = run
        self._shape = shape
        self._seconds = seconds

    def profile(self) -> ModelProfile:
        singles, prompts = self._points()
        layers, chunk = _layers(singles, prompts), prompts[-1] if prompts else None
        decoding, chunks = self._attention(singles, chunk)
        in_place: Points = ()
        if self._run.pack():
            in_place = _layers(*self._points())
        return ModelProfile(
            layers=layers,
            in_place=in_place,
            head=tuple((each.rows, each.head) for each in singles) if self._run.whole_head else (),
            program=statistics.median(each.program for each in singles),
            device_attention=decoding,
            attention_flops=chunks,
        )

    def _points(self) -> tuple[list[Timed], list[Timed]]:
        """Single rows, and prompts, as many as there is time for."""
        start = time.perf_counter()
        found: dict[bool, list[Timed]] = {True: [], False: []}
        last: Timed | None = None
        for rows in (*_SINGLE_ROWS, *self._run.prompt_rows):
            single = rows <= _SINGLE_ROWS[-1]
            if last is not None and not single:
                left = _POINTS_PART * self._seconds - (time.perf_counter() - start)
                if (_FEW + 1) * last.wall * rows / last.rows > left:
                    break
            run = self._run
            given = (rows, 1) if single else (rows // _PROMPT, _PROMPT)
            last = (run.generating if single else run.prompts)(*given, _FEW)
            found[single].append(last)
        return found[True], found[False]

    def _attention(self, singles: list[Timed], short: Timed | None) -> tuple[float, float]:
        """Bytes and operations per second: what longer contexts add to the same rows."""
        run, shape = self._run, self._shape
        dearest = short or singles[-1]
        of_context = run.context * dearest.wall / dearest.rows
        affordable = int(_CONTEXT_PART * self._seconds / of_context)
        count = max(1, min(run.sequences_at_once, affordable))
        alone = run.generating(count, 1, _MANY)
        beside = run.generating(count, run.context, _MANY)
        read = (beside.read - alone.read) * sum(shape.kv_rows)
        more = beside.seconds - alone.seconds
        decoding = read / more if more > 0 else math.inf
        length = min(run.context, run.prompt_rows[-1] if run.prompt_rows else 0)
        if short is None or length <= _PROMPT:
            return decoding, math.inf
        return decoding, self._chunk_flops(short, length)

    def _chunk_flops(self, short: Timed, length: int) -> float:
        """Of prompts of `length`, against as many rows of short ones."""
        long = self._run.prompts(max(1, short.rows // length), length, _FEW)
        more = long.seconds - short.seconds * long.rows / short.rows
        positions = long.positions - short.positions * long.rows / short.rows
        flops = positions * self._shape.attention_flops
        return flops / more if more > 0 else math.inf


def _layers(singles: list[Timed], prompts: list[Timed]) -> Points:
    """Rising: more rows never take less time."""
    points: list[tuple[int, float]] = []
    for each in [*singles, *prompts]:
        least = points[-1][1] if points else 0.0
        points.append((each.rows, max(least, each.seconds)))
    return tuple(points)
