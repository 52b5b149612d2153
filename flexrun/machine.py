"""The device a job runs on, its budgets, and the type it computes in."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from flexrun.errors import UsageError
from offload.backend_cpu import CpuBackend
from offload.backend_cuda import CudaBackend
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.tiers import MemoryAccount, Tier
from policy_search.machine import (
    SHARE_OF_FREE,
    computed_on_cpu,
    disk_budget,
    host_budget,
    offload_dir,
)

if TYPE_CHECKING:
    from pathlib import Path

    from flexrun.config import EngineConfig
    from offload.backend import DeviceBackend

logger = logging.getLogger(__name__)


def open_backend(config: EngineConfig) -> DeviceBackend:
    """The compute device with its budgets. Raises `UsageError`."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "no CUDA device can be used", hint="check `nvidia-smi` and that torch has CUDA support"
        )
    if config.emulate is not None and name != "emulated":
        raise UsageError(f"--emulate describes --device emulated, not {name}")
    account = MemoryAccount(limits=_limits(config, name))
    if name == "cuda":
        return CudaBackend(account, torch.device("cuda", torch.cuda.current_device()))
    if name == "emulated":
        return EmulatedBackend(account, _emulated_machine(config))
    return CpuBackend(account)


def _emulated_machine(config: EngineConfig) -> EmulatedMachine:
    return EmulatedMachine.parse(config.emulate) if config.emulate else EmulatedMachine()


def _limits(config: EngineConfig, name: str) -> dict[Tier, int]:
    ram = host_budget()
    device = ram
    if name == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself does not count as free
        device = int(torch.cuda.mem_get_info()[0] * SHARE_OF_FREE)
    elif name == "emulated":
        device = _emulated_machine(config).capacity or ram
    given = {
        Tier.DEVICE: config.device_memory,
        Tier.HOST: config.host_memory,
        Tier.DISK: config.disk_space,
    }
    free = {Tier.DEVICE: device, Tier.HOST: ram, Tier.DISK: disk_budget(config.offload_dir)}
    if config.device_memory is not None and name == "emulated":
        return {t: min(free[t], given[t] or free[t]) for t in Tier}
    return {tier: free[tier] if given[tier] is None else int(given[tier] or 0) for tier in Tier}


def offload_directory(config: EngineConfig) -> Path:
    """Where the DISK tier's file lies."""
    return offload_dir(config.offload_dir)


def choose_types(
    requested: str, stored: torch.dtype, device: torch.device
) -> tuple[torch.dtype, torch.dtype]:
    """The types that weights are stored and computed in; `stored` is the checkpoint's.

    A CPU without instructions for a 16-bit type multiplies it many times slower than float32. There
    weights stay 16-bit in memory, on disk and on the links, and each layer's are expanded once a
    sweep: exact, and the activations and the KV cache are float32.
    """
    dtype = stored if requested == "auto" else getattr(torch, requested)
    assert isinstance(dtype, torch.dtype)
    if device.type != "cpu":
        return dtype, dtype
    name = str(dtype).removeprefix("torch.")
    if name == computed_on_cpu(name):
        return dtype, dtype
    logger.warning("this CPU multiplies %s slowly: computing in float32", name)
    return dtype, torch.float32
