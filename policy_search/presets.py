"""Machines by name: what jobs reach on them, from datasheets, for plans without the machine."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.tiers import Tier
from policy_search.datasheets import DATASHEETS
from policy_search.errors import PolicyError
from policy_search.hardware import Hardware
from policy_search.machine_spec import MEMORIES, MachineSpec, read_speeds, whole_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from policy_search.datasheets import Datasheet

# What a job may take of each memory: drivers, the system and other programs have the rest.
DEVICE_SHARE = 0.9
HOST_SHARE = 0.85
DISK_SHARE = 0.9

# What is reached of each peak. A machine that is there should be measured instead.
LINK = 0.82
"""Of a link's bits: packets have headers, and the other side answers. NVIDIA's nvbandwidth reaches
24 to 27 GB/s of 31.5 on PCIe 4.0 x16 (its issues 15 and 42) and 53 of 63 on 5.0 (issue 24); FlexGen
13.8 of 15.8 on 3.0. Taken for NVLink-C2C as well."""
DEVICE_MEMORY = 0.85
"""Of the GPU's memory bandwidth. BabelStream reads 0.85 to 0.93 of it."""
RAM = 0.75
"""Of RAM's. STREAM's triad reaches 0.7 to 0.85 of it with all channels filled: 330 to 350 GB/s of
410, 650 to 780 of 922 (Microsoft's figures for Azure's HBv3 and HBv4)."""
HOST_ATTENTION = 0.7
"""Of what RAM reaches. This project's kernels read keys and values at 0.5 to 0.9 of the rate at
which memory is read."""
DISK = 0.85
"""Of a disk's sequential speed, which is what its datasheet has."""
PRODUCTS = 0.7
"""Of operations on matrices. Large products reach 0.8 to 0.9 on an A100 (FlashAttention-2, section
1), those of layers and their micro-batches less."""
ATTENTION_PRODUCTS = 0.5
"""The same of attention: 0.5 to 0.73 on an A100 (FlashAttention-2, section 4), less on others."""
EXPANSION = 2 / 3
"""Of what the memory reaches: for two bytes that are written, one is read, or half of one."""

_T4_MEASURED = {
    "host_to_device": 12.89 * 2**30,
    "flops": 21.24e12,
    "attention_flops": 9.97e12,
    "disk_read": 2.0e9,
    "disk_write": 1.0e9,
}
"""What FlexGen's authors measured and fitted there, and have in their cost model and paper. Their
rates of attention on the processor (12 GB/s), of reads of the disk (0.5) and of copies of keys and
values to RAM (1) are those of FlexGen's own ways to do it, not of the machine."""


def _reached(sheet: Datasheet) -> Hardware:
    """The speeds of a machine with a GPU."""
    memory, ram = DEVICE_MEMORY * sheet.device_bandwidth, RAM * sheet.ram_bandwidth
    link = min(LINK * sheet.link, ram)
    return Hardware(
        host_to_device=link,
        device_to_host=link,
        links_together=ram,
        host_attention=HOST_ATTENTION * ram,
        disk_read=DISK * sheet.disk_read,
        disk_write=DISK * sheet.disk_write,
        swap=link,
        expansion=EXPANSION * memory,
        matrix_read=memory,
        device_attention=memory,
        flops=PRODUCTS * sheet.flops,
        attention_flops=ATTENTION_PRODUCTS * sheet.flops,
    )


def _reached_by_cpu(sheet: Datasheet) -> Hardware:
    """The speeds of one without: RAM is the device's memory, and only the disk is away from it."""
    ram = RAM * sheet.ram_bandwidth
    disk_write = DISK * sheet.disk_write
    return Hardware(
        host_to_device=float("inf"),
        links_together=ram,
        disk_read=DISK * sheet.disk_read,
        disk_write=disk_write,
        swap=disk_write,
        expansion=EXPANSION * ram,
        matrix_read=ram,
        device_attention=HOST_ATTENTION * ram,
        flops=PRODUCTS * sheet.flops,
        attention_flops=ATTENTION_PRODUCTS * sheet.flops,
    )


def _preset(name: str, sheet: Datasheet) -> MachineSpec:
    unified, ram = not sheet.device_memory, int(HOST_SHARE * sheet.ram)
    limits = {
        Tier.DEVICE: ram if unified else int(DEVICE_SHARE * sheet.device_memory),
        Tier.HOST: ram,
        Tier.DISK: int(DISK_SHARE * sheet.disk),
    }
    hardware = _reached_by_cpu(sheet) if unified else _reached(sheet)
    source = f"{sheet.source}. Speeds are the parts of these peaks that are usually reached"
    return MachineSpec(name=name, limits=limits, hardware=hardware, unified=unified, source=source)


def _measured(spec: MachineSpec, speeds: Mapping[str, Any], source: str) -> MachineSpec:
    hardware = replace(spec.hardware, **speeds)
    return replace(spec, hardware=hardware, source=f"{spec.source}; {source}")


PRESETS = {name: _preset(name, sheet) for name, sheet in DATASHEETS.items()}
"""Machines that can be planned for by name."""
PRESETS["t4"] = _measured(
    PRESETS["t4"],
    _T4_MEASURED,
    "the link to the GPU, its operations and the disk as FlexGen's authors measured them",
)


def machine(text: str, overrides: Mapping[str, float | int]) -> MachineSpec:
    """A preset by name, or the machine in a file (`*.json`), with some values replaced.

    `overrides`: bytes of device_memory, host_memory and disk_space, and speeds by the names of
    `Hardware`'s fields. Raises `PolicyError`.
    """
    spec = _find(text)
    speeds = [field.name for field in fields(Hardware) if field.name != "products"]
    if unknown := sorted(overrides.keys() - {*MEMORIES, *speeds}):
        known = ", ".join([*MEMORIES, *speeds])
        raise PolicyError(f"a machine has no {unknown[0]}", hint=f"it has: {known}")
    try:
        hardware = _with_speeds(spec.hardware, {n: v for n, v in overrides.items() if n in speeds})
        sizes = {n: whole_bytes(n, v) for n, v in overrides.items() if n in MEMORIES}
    except PolicyError as error:
        hint = "speeds are bytes or operations per second, memories bytes"
        raise PolicyError(error.message, hint=hint) from None
    limits = spec.limits | {MEMORIES[name]: nbytes for name, nbytes in sizes.items()}
    named = [sizes[name] for name in ("device_memory", "host_memory") if name in sizes]
    if spec.unified and named:  # one memory with two names
        limits |= dict.fromkeys((Tier.DEVICE, Tier.HOST), min(named))
    source = f"{spec.source}; as given: {', '.join(overrides)}" if overrides else spec.source
    return replace(spec, hardware=hardware, limits=limits, source=source)


def _find(text: str) -> MachineSpec:
    found = PRESETS.get(text.lower())
    if found is not None:
        return found
    path = os.path.expanduser(text)
    if text.lower().endswith(".json") or os.path.isfile(path):
        return MachineSpec.load(Path(path))
    raise PolicyError(
        f"no machine is known as {text!r}",
        hint=f"known: {', '.join(PRESETS)}; or a file that `policy-search calibrate -o FILE.json` "
        "wrote on the machine",
    )


def _with_speeds(hardware: Hardware, speeds: Mapping[str, float | int]) -> Hardware:
    """`hardware` with other speeds. Raises `PolicyError`."""
    read = read_speeds(dict(speeds))
    changed = {name: getattr(read, name) for name in speeds}
    # Measured products say more than these two do, and would hide what they are set to.
    products = () if {"flops", "matrix_read"} & speeds.keys() else hardware.products
    return replace(hardware, **changed, products=products)
