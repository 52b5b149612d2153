"""The CPU as the compute device: DEVICE is a RAM budget, HOST is the same memory, disk is real."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from offload.backend import DeviceBackend
from offload.links import Link
from offload.ram import map_memory
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence


class CpuBackend(DeviceBackend):
    """Computes where HOST memory is, so only the disk has links."""

    name = "cpu"
    device = torch.device("cpu")
    unified = True
    lazy: Sequence[Tier] = (Tier.DEVICE, Tier.HOST)
    links = (Link.DISK_TO_DEVICE, Link.HOST_TO_DISK)

    def _allocate(self, tier: Tier, nbytes: int) -> torch.Tensor:
        return map_memory(nbytes)
