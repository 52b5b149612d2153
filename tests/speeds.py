"""The machine that tests plan for, whatever machine they run on."""

from __future__ import annotations

from offload.tiers import Tier
from policy_search.hardware import Hardware
from policy_search.machine_spec import MachineSpec

SPEEDS = Hardware(
    host_to_device=2e9,
    device_to_host=2e9,
    host_attention=4e9,
    disk_read=5e8,
    disk_write=5e8,
    expansion=1e9,
    matrix_read=1e10,
    device_attention=1e10,
    flops=1e11,
)


def machine(limits: dict[Tier, int], *, unified: bool = False) -> MachineSpec:
    """With these bytes per tier."""
    return MachineSpec(name="test", limits=limits, hardware=SPEEDS, unified=unified)
