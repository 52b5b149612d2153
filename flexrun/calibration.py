"""What is measured before the first sweep, and what the scheduler does with it."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from offload.links import Link
from policy_search.cost_model import free_rows, swapping_is_cheaper, weight_seconds
from policy_search.hardware import Hardware

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexrun.scheduler import BatchScheduler
    from offload.backend import DeviceBackend
    from offload.weights import WeightStore
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy

_MOST_VALUES = 1 << 24
"""Of the matrix that is multiplied with."""
_ROWS = {"cpu": 256}
_MANY_ROWS = 2048
_REPEATS = 5


def measured_flops(
    backend: DeviceBackend, dtype: torch.dtype, hidden_size: int, widest: int
) -> float:
    """Operations per second of products of many rows with a matrix as a layer's widest one.

    The median of a few, after one that is not counted.
    """
    columns = max(1, min(widest, _MOST_VALUES // hidden_size))
    rows = _ROWS.get(backend.device.type, _MANY_ROWS)
    matrix = torch.ones(columns, hidden_size, dtype=dtype, device=backend.device)
    values = torch.ones(rows, hidden_size, dtype=dtype, device=backend.device)
    seconds = []
    for _ in range(_REPEATS + 1):
        backend.synchronize(backend.record())
        start = time.perf_counter()
        torch.nn.functional.linear(values, matrix)
        backend.synchronize(backend.record())
        seconds.append(time.perf_counter() - start)
    return 2 * rows * columns * hidden_size / sorted(seconds[1:])[_REPEATS // 2]


def measured_hardware(
    backend: DeviceBackend,
    dtype: torch.dtype,
    shape: ModelShape,
    speeds: Mapping[Link, float],
) -> Hardware:
    """The device's compute beside the links' `speeds`, where these are known."""
    to_device = (Link.HOST_TO_DEVICE, Link.DEVICE_TO_HOST)
    disk = (backend.disk_in, Link.HOST_TO_DISK)
    return Hardware(
        host_to_device=next((speeds[link] for link in to_device if link in speeds), math.inf),
        disk_read=next((speeds[link] for link in disk if link in speeds), math.inf),
        flops=measured_flops(backend, dtype, shape.hidden_size, shape.widest),
    )


def tune(
    scheduler: BatchScheduler,
    policy: Policy,
    shape: ModelShape,
    hardware: Hardware,
    store: WeightStore,
) -> None:
    """Rows that are free, guesses that may fill them, and where pages go that have to go away."""
    if store.streamed_bytes:
        seconds = weight_seconds(store.streamed_bytes, store.disk_bytes, hardware)
        scheduler.free_rows = int(free_rows(shape, hardware, seconds))
        if policy.speculation != "off":
            scheduler.speculation.most_rows = scheduler.free_rows
    if policy.preemption == "swap":
        scheduler.preemption.swapping_is_cheaper = lambda _: True
    elif policy.preemption == "auto":
        scheduler.preemption.swapping_is_cheaper = partial(swapping_is_cheaper, shape, hardware)
