"""What a machine's device computes: products of few and of many rows, and weights that expand."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compression.selection import Quantization
from flexrun.measuring import Room, median_seconds
from offload.slabs import Weight
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload.backend import DeviceBackend

ROWS = {"cpu": (1, 4, 16, 64, 256, 1024), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}
"""Of products, by the type of device."""
_FEW_ROWS = 4
"""So few take as long as the matrix is read."""
_SIDE = {"cpu": 4096, "cuda": 8192}
"""Of a square matrix: as large as a layer's, and read for longer than a product takes to begin."""
_MATRIX_BYTES = 512 << 20
"""Of all matrices, which are multiplied with in turn: more than caches hold."""
_EXPANDED_BYTES = 256 << 20
_LEAST_SIDE = 64


class Products(Room):
    """Matrices in the device's memory, while it is entered."""

    def __init__(self, backend: DeviceBackend, dtype: torch.dtype) -> None:
        super().__init__(backend)
        self._kind = backend.device.type
        side, room = _SIDE[self._kind], self.left(Tier.DEVICE) // 4
        # A quarter for the matrices, of which there are several, and a quarter for the rows.
        while 4 * side * side * dtype.itemsize > room and side > _LEAST_SIDE:
            side //= 2
        self._side, self._dtype = side, dtype
        self._count = min(room, _MATRIX_BYTES) // (side * side * dtype.itemsize)
        self._most_rows = room // (2 * side * dtype.itemsize)
        self._matrices: list[torch.Tensor] = []
        self._rows = torch.empty(0)

    def prepare(self) -> bool:
        """Take the memory; whether there is enough to measure anything."""
        rows = [rows for rows in ROWS[self._kind] if rows <= self._most_rows]
        if not rows or not self._count:
            return False
        each = self._side * self._side * self._dtype.itemsize
        memory = self.numbers(self.take(Tier.DEVICE, self._count * each), self._dtype)
        self._matrices = list(memory.view(self._count, self._side, self._side))
        nbytes = rows[-1] * self._side * self._dtype.itemsize
        self.charge(Tier.DEVICE, nbytes)  # of what comes out
        taken = self.numbers(self.take(Tier.DEVICE, nbytes), self._dtype)
        self._rows = taken.view(rows[-1], self._side)
        return True

    def product(self, rows: int) -> Callable[[], object]:
        """A call that multiplies at most `rows` rows, each time with the next matrix."""
        matrices, values = itertools.cycle(self._matrices), self._rows[:rows]
        return lambda: torch.nn.functional.linear(values, next(matrices))

    def measure(self, seconds: float) -> dict[str, Any]:
        """Operations per second by rows, the most of them, and bytes per second of matrices."""
        rows = [rows for rows in ROWS[self._kind] if rows <= len(self._rows)]
        each = seconds / len(rows)
        taken = {n: median_seconds(self.backend, self.product(n), each) for n in rows}
        values = self._side * self._side
        points = tuple((n, 2 * n * values / taken[n]) for n in rows)
        fastest = min(taken[n] for n in rows if n <= _FEW_ROWS)
        return {
            "products": points,
            "flops": max(speed for _, speed in points),
            "matrix_read": values * self._dtype.itemsize / fastest,
        }


def measured_products(backend: DeviceBackend, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """`products`, `flops` and `matrix_read` of `Hardware`."""
    with Products(backend, dtype) as products:
        if not products.prepare():
            return {"products": (), "flops": math.inf, "matrix_read": math.inf}
        return products.measure(seconds)


def measured_expansion(
    backend: DeviceBackend, dtype: torch.dtype, seconds: float
) -> dict[str, float]:
    """Bytes per second of `dtype` that come out of matrices in groups of 4 bits."""
    name = str(dtype).removeprefix("torch.")
    columns = _SIDE[backend.device.type]
    spec = Quantization(weight_bits=4).of(
        "matrix", (columns, columns), name, in_layer=True, experts=0
    )
    assert spec is not None
    with Room(backend) as room:
        stored, expanded = spec.row_bytes(columns), columns * dtype.itemsize
        rows = min(room.left(Tier.DEVICE) // 2 // (stored + expanded), _EXPANDED_BYTES // expanded)
        if not rows:
            return {"expansion": math.inf}
        weight = Weight("matrix", torch.Size([rows, columns]), dtype, (), spec=spec)
        # Scales and centres of these bytes are small numbers, in either type.
        data = room.take(Tier.DEVICE, rows * stored).fill_(0x3C)
        out = room.take(Tier.DEVICE, rows * expanded).view(dtype).view(rows, columns)
        taken = median_seconds(backend, partial(weight.fill, out, data), seconds)
        return {"expansion": out.nbytes / taken}
