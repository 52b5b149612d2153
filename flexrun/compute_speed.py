"""How fast the device multiplies matrices, measured in a few milliseconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from offload.backend import DeviceBackend

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
