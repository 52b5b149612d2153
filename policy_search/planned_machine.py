"""The machine that a plan is for: this one, or one that is named, as flags change it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from offload.tiers import Tier
from policy_search.calibration_file import load_calibration, machine_key
from policy_search.errors import PolicyError
from policy_search.flags import AUTO, checked_speeds, stated_hardware
from policy_search.machine import disk_budget, gpu_budget, host_budget
from policy_search.machine_spec import MachineSpec
from policy_search.presets import machine

if TYPE_CHECKING:
    import argparse

    from policy_search.hardware import Hardware
    from policy_search.model_config import ModelConfig

_FIELDS = {
    "link": ("host_to_device", "device_to_host"),
    "disk_read": ("disk_read",),
    "host_attention": ("host_attention",),
    "expansion": ("expansion",),
    "matrix_read": ("matrix_read",),
    "tflops": ("flops", "attention_flops"),
}
"""Speeds that a flag states."""


def planned_machine(arguments: argparse.Namespace, config: ModelConfig) -> MachineSpec:
    """What the flags say. Raises `PolicyError`."""
    if arguments.hardware == AUTO:
        found = _this_machine(arguments, config)
    else:
        found = machine(arguments.hardware, {})
        if arguments.unified and not found.unified:
            raise PolicyError(
                f"--unified says that the CPU computes, but {found.name} has a GPU",
                hint="leave out --unified, or give --hardware cpu",
            )
    limits, unified = dict(found.limits), found.unified or arguments.unified
    given = arguments.device_memory, arguments.host_memory, arguments.disk_space
    for tier, value in zip(Tier, given):
        limits[tier] = limits[tier] if value is None else value
    if unified:
        # One memory with two names: the plan must fit into both.
        known = [value for value in given[:2] if value is not None]
        limits[Tier.DEVICE] = min(known) if known else limits[Tier.DEVICE]
    hardware = _as_stated(found.hardware, arguments)
    # What was measured of models here says nothing of a device with another speed.
    others = {"tflops", "matrix_read"} & checked_speeds(arguments).keys()
    key = "" if others else found.key
    return replace(found, limits=limits, unified=unified, hardware=hardware, key=key)


def _this_machine(arguments: argparse.Namespace, config: ModelConfig) -> MachineSpec:
    """What is free here now, and what was measured; else speeds of a common GPU, or of the cores.

    A machine whose GPU memory is given has one.
    """
    device = arguments.device_memory
    if device is None and not arguments.unified:
        device = gpu_budget()
    unified = arguments.unified or device is None
    ram = host_budget()
    limits = {
        Tier.DEVICE: ram if unified or device is None else device,
        Tier.HOST: ram,
        Tier.DISK: disk_budget(arguments.offload_dir),
    }
    kind = "cpu" if unified else "cuda"
    _, computed = config.types(arguments.dtype, unified=unified)
    key = machine_key(kind, computed, arguments.offload_dir)
    measured = load_calibration(key)
    name = "this machine, with its CPU" if unified else "this machine, with its GPU"
    if measured is not None:
        return MachineSpec(
            name=name,
            limits=limits,
            hardware=measured.hardware,
            unified=unified,
            source="measured",
            key=key.digest,
        )
    return MachineSpec(
        name=name,
        limits=limits,
        hardware=stated_hardware(arguments, unified=unified),
        unified=unified,
        source="speeds are assumed: `policy-search calibrate` measures them",
    )


def _as_stated(hardware: Hardware, arguments: argparse.Namespace) -> Hardware:
    changed: dict[str, Any] = {}
    for name, value in checked_speeds(arguments).items():
        factor = 1e12 if name == "tflops" else 1
        changed |= dict.fromkeys(_FIELDS[name], float(value * factor))
        if name == "link":  # which share RAM with each other
            times = value / hardware.host_to_device
            changed["links_together"] = max(1.0, times) * hardware.links_together
        if name in ("tflops", "matrix_read"):
            changed["products"] = ()
    return replace(hardware, **changed)
