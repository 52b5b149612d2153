"""What a machine can do, measured without any model: the result serves plans for all of them."""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from flexrun.attention_calibration import (
    measured_chunk,
    measured_decoding,
    measured_host_attention,
    page_bytes,
)
from flexrun.compute_calibration import measured_expansion, measured_products
from flexrun.link_calibration import LinkCalibration
from offload.tiers import Tier
from policy_search.calibration_file import processor_name
from policy_search.hardware import Hardware
from policy_search.machine_spec import MachineSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    from offload.backend import DeviceBackend

    Measure = Callable[[float], dict[str, Any]]

_FILLING, _LINK, _TOGETHER, _PAGES = 0.1, 0.06, 0.06, 0.03
_PRODUCTS, _EXPANSION, _HOST, _DECODING, _CHUNK = 0.25, 0.04, 0.08, 0.05, 0.05
"""Parts of the time. What compiles, and what is written before it can be read, comes on top."""


def measure_machine(
    backend: DeviceBackend,
    dtype: torch.dtype,
    directory: Path,
    *,
    seconds: float = 30.0,
    on_measured: Callable[[Sequence[str], float], None] = lambda names, seconds: None,
) -> MachineSpec:
    """Speeds of `backend`, which has a budget for every tier, and computes in `dtype`.

    `directory`: the offload directory. `on_measured` is told which fields of `Hardware` have been
    measured, and how long that took. What the budgets leave no room for has no limit. Raises
    `CapacityError` and `OffloadStoreError`.
    """
    limits = {tier: backend.account.limits[tier] for tier in Tier}
    assert not any(limit is None for limit in limits.values()), "a tier has no limit"
    found: dict[str, Any] = {}
    with torch.inference_mode(), contextlib.closing(_steps(backend, dtype, directory)) as steps:
        for part, measure in steps:
            start = time.perf_counter()
            values = measure(part * seconds)
            found |= values
            on_measured(list(values), time.perf_counter() - start)
    found.setdefault("host_to_device", math.inf)
    computed = str(dtype).removeprefix("torch.")
    return MachineSpec(
        name=_name(backend),
        limits={tier: int(limit or 0) for tier, limit in limits.items()},
        hardware=Hardware(**found),
        unified=backend.unified,
        source=f"measured on {datetime.date.today()}, computing in {computed}",
    )


def _steps(
    backend: DeviceBackend, dtype: torch.dtype, directory: Path
) -> Generator[tuple[float, Measure]]:
    """What is measured, one after another, each with its part of the time."""
    with LinkCalibration(backend, directory, page_bytes(dtype)) as links:
        yield _FILLING, links.prepare
        for link in backend.links:
            yield _LINK, partial(links.alone, link)
        yield _TOGETHER, links.together
        yield _PAGES, links.pages
    yield _PRODUCTS, partial(measured_products, backend, dtype)
    yield _EXPANSION, partial(measured_expansion, backend, dtype)
    if not backend.unified:
        yield _HOST, partial(measured_host_attention, backend, dtype)
    yield _DECODING, partial(measured_decoding, backend, dtype)
    yield _CHUNK, partial(measured_chunk, backend, dtype)


def _name(backend: DeviceBackend) -> str:
    if backend.device.type == "cuda":
        return torch.cuda.get_device_name(backend.device)
    return f"{backend.name}, {processor_name()}"
