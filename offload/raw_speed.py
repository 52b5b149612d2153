"""What each link reaches when nothing else runs: the measure that a job's transfers are held to."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from offload.links import Link
from offload.transfer_engine import TransferEngine

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Sequence

    from offload.backend import DeviceBackend, Source, Target
    from offload.transfer import Transfer

SECONDS = 0.2
"""For one link."""
_WARM_UP = 0.1
AT_LEAST = 8
"""Copies, however long they take: the first ones find the links cold."""
_QUEUED = 6


@dataclass(frozen=True, slots=True)
class RawCopy:
    """One piece of a job's bytes and where it may be copied to."""

    source: Source
    target: Target
    buffer: int
    """Copies to the same buffer follow each other."""


def raw_speeds(
    backend: DeviceBackend,
    copies: Iterable[tuple[Link, list[RawCopy]]],
    seconds: float | None = None,
) -> dict[Link, float]:
    """Bytes per second of each link, from copies of a job's own bytes between its own buffers.

    `copies` gives pieces to copy again and again, with as many under way as in a job. `seconds`:
    for one link, after half as many that are not counted; None: `SECONDS`.
    """
    transfers = TransferEngine(backend)
    try:
        return {
            link: _plain_speed(backend, link, pieces) or _speed(transfers, link, pieces, seconds)
            for link, pieces in copies
            if pieces
        }
    finally:
        transfers.close()


def _plain_speed(backend: DeviceBackend, link: Link, pieces: list[RawCopy]) -> float | None:
    if link is not Link.HOST_TO_DEVICE:
        return None
    pairs = [(piece.source, piece.target) for piece in pieces]
    tensors = [p for p in pairs if all(isinstance(side, torch.Tensor) for side in p)]
    return backend.raw_speed(tensors)  # type: ignore[arg-type]


def speed_together(
    backend: DeviceBackend, copies: Sequence[tuple[Link, list[RawCopy]]], seconds: float
) -> float:
    """Bytes per second in sum of links (at least one) that all copy at once; see `raw_speeds`."""
    transfers = TransferEngine(backend)
    try:
        with ThreadPoolExecutor(len(copies), "flexrun measuring links") as threads:
            running = [threads.submit(_speed, transfers, *each, seconds) for each in copies]
            return sum(each.result() for each in running)
    finally:
        transfers.close()


def copy_until(
    backend: DeviceBackend, link: Link, pieces: list[RawCopy], over: threading.Event
) -> float:
    """Bytes per second of one link that copies until something is `over`; see `raw_speeds`."""
    transfers = TransferEngine(backend)
    try:
        start = time.perf_counter()
        nbytes = _copy_while(transfers, link, pieces, lambda _: not over.is_set())
        return nbytes / (time.perf_counter() - start)
    finally:
        transfers.close()


def _speed(
    transfers: TransferEngine, link: Link, pieces: list[RawCopy], seconds: float | None
) -> float:
    warm_up, measured = (_WARM_UP, SECONDS) if seconds is None else (seconds / 2, seconds)
    _copy_for(transfers, link, pieces, warm_up)  # memory is slow when it is first written
    start = time.perf_counter()
    nbytes = _copy_for(transfers, link, pieces, measured)
    return nbytes / (time.perf_counter() - start)


def _copy_for(transfers: TransferEngine, link: Link, pieces: list[RawCopy], seconds: float) -> int:
    end = time.perf_counter() + seconds
    return _copy_while(
        transfers, link, pieces, lambda number: number < AT_LEAST or time.perf_counter() < end
    )


def _copy_while(
    transfers: TransferEngine,
    link: Link,
    pieces: list[RawCopy],
    going_on: Callable[[int], bool],
) -> int:
    """Bytes that were copied; `going_on` is asked before each copy, with its number."""
    nbytes, number = 0, 0
    waiting: list[Transfer] = []
    last: dict[int, Transfer] = {}
    while going_on(number):
        piece = pieces[number % len(pieces)]
        after = [last.get(piece.buffer)]
        transfer = transfers.submit(link, piece.source, piece.target, kind="raw", after=after)
        last[piece.buffer] = transfer
        waiting.append(transfer)
        nbytes += piece.source.nbytes
        number += 1
        if len(waiting) > _QUEUED:  # always something queued, so that the link is never idle
            waiting.pop(0).synchronize()
    for transfer in waiting:
        transfer.synchronize()
    return nbytes
