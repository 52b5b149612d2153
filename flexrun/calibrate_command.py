"""`policy-search calibrate`: measure this machine once, for all later plans."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexrun.arguments import engine_config, flag_of
from flexrun.config import DEVICES, DTYPES
from flexrun.errors import PolicyError
from offload.tiers import format_size
from policy_search.calibration_file import (
    machine_key,
    save_calibration,
    write_file,
)
from policy_search.flags import size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from policy_search.calibration_file import MachineKey
    from policy_search.machine_spec import MachineSpec

DONE, INTERRUPTED = 0, 130
_MOST_SECONDS = 600.0
_BYTES, _FLOPS = (1e9, "GB/s"), (1e9, "GFLOP/s")
_TABLE: dict[str, tuple[str, float, str]] = {
    "disk_read": ("disk, read", *_BYTES),
    "disk_write": ("disk, written", *_BYTES),
    "host_to_device": ("host to device", *_BYTES),
    "device_to_host": ("device to host", *_BYTES),
    "links_together": ("all links at once", *_BYTES),
    "swap": ("pages of waiting sequences", *_BYTES),
    "flops": ("products of many rows", *_FLOPS),
    "matrix_read": ("matrices, by few rows", *_BYTES),
    "expansion": ("weights of 4 bits, expanded", *_BYTES),
    "host_attention": ("attention on host", *_BYTES),
    "hosted_call": ("rows to it and back", 1e-6, "us"),
    "contention": ("lost to it and by it", 0.01, "%"),
    "device_attention": ("attention on the device", *_BYTES),
    "attention_flops": ("attention of a prompt's rows", *_FLOPS),
}
"""By field of `Hardware`: what it is, and its unit."""


def add_calibrate_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `policy-search calibrate`."""
    add = parser.add_argument
    add("--device", default="auto", choices=DEVICES, help="where to compute (%(default)s)")
    text = "the machine of --device emulated, such as capacity=1GiB,host-to-device=2GB/s"
    add("--emulate", metavar="TEXT", help=text)
    text = "type of weights; auto: bfloat16, computed in float32 where that is faster"
    add("--dtype", default="auto", choices=DTYPES, help=text)
    add("--offload-dir", type=Path, metavar="DIR", help="the disk; default: the user's cache")
    nbytes: dict[str, Any] = {"type": size, "metavar": "SIZE"}
    add("--device-memory", **nbytes, help="such as 16GiB; default: what the device has free")
    add("--host-memory", **nbytes, help="likewise of RAM")
    add("--disk-space", **nbytes, help="likewise of the offload directory's disk")
    text = "that measuring takes, about; what has to be compiled comes on top (%(default)g)"
    add("--seconds", type=_seconds, default=30.0, metavar="N", help=text)
    add("-o", "--output", type=Path, metavar="FILE", help="write the machine for --hardware, too")
    add("--json", action="store_true", help="print one JSON object instead of text")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= _MOST_SECONDS:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, of at most 600 seconds")


def run_calibrate(arguments: argparse.Namespace) -> int:
    """Measure, keep and print what the machine can do; returns the exit code.

    Raises `FlexrunError`.
    """
    output: Path | None = arguments.output
    if output is not None and not output.absolute().parent.is_dir():
        raise PolicyError(
            f"cannot write {output}: there is no directory {output.parent}",
            hint="give another file with -o",
        )
    try:
        key, machine, taken = _measured(arguments)
    except KeyboardInterrupt:
        print("policy-search: interrupted; nothing was kept", file=sys.stderr)
        return INTERRUPTED
    if output is not None:
        write_file(output, machine.to_json() + "\n", hint="give another file with -o")
    path = save_calibration(key, machine)
    if arguments.json:
        plain = {"machine": json.loads(machine.to_json()), "path": str(path), "seconds": taken}
        print(json.dumps(plain))
    else:
        print(_text(machine, taken))
        print(f"\nkept in {path}")
    return DONE


def _measured(
    arguments: argparse.Namespace,
) -> tuple[MachineKey, MachineSpec, dict[str, float]]:
    """The machine, what it can do, and the seconds that each measurement took."""
    import torch

    from flexrun.machine import choose_types, offload_directory, open_backend
    from flexrun.machine_calibration import measure_machine

    names = ("device", "emulate", "dtype", "offload_dir", "device_memory", "host_memory")
    given = {name: getattr(arguments, name) for name in (*names, "disk_space")}
    config = engine_config({"model": "", **given}, flag_of)
    directory = offload_directory(config)
    taken: dict[str, float] = {}
    start = time.perf_counter()

    def note(fields: Sequence[str], seconds: float) -> None:
        taken.update(dict.fromkeys(fields[:1], seconds))
        if sys.stderr.isatty():
            print(f"measured: {', '.join(fields) or 'room on disk'}", file=sys.stderr)

    with contextlib.closing(open_backend(config)) as backend:
        _, computed = choose_types(config.dtype, torch.bfloat16, backend.device)
        dtype = str(computed).removeprefix("torch.")
        key = machine_key(backend.name, dtype, directory, config.emulate)
        machine = measure_machine(
            backend, computed, directory, seconds=arguments.seconds, on_measured=note
        )
    return key, machine, taken | {"all": time.perf_counter() - start}


def _text(machine: MachineSpec, taken: dict[str, float]) -> str:
    memories = ", ".join(f"{tier} {format_size(size)}" for tier, size in machine.limits.items())
    lines = [machine.name, machine.source, f"free: {memories}", ""]
    lines += _rows(machine, taken)
    return "\n".join([*lines, f"{'all':<44}{taken['all']:6.1f} s"])


def _rows(machine: MachineSpec, taken: dict[str, float]) -> Iterator[str]:
    for name, (what, unit, unit_name) in _TABLE.items():
        value = getattr(machine.hardware, name)
        if name in taken or 0 < value < math.inf:
            yield _row(what, value / unit, unit_name, taken.get(name))
    for rows, speed in machine.hardware.products:
        text = f"products of {rows} row{'s' if rows > 1 else ''}"
        first = rows == machine.hardware.products[0][0]
        yield _row(text, speed / 1e9, "GFLOP/s", taken.get("products") if first else None)


def _row(what: str, value: float, unit: str, seconds: float | None) -> str:
    number = f"{value:8.{1 if value >= 100 else 2}f}" if value < math.inf else "       -"
    row = f"{what:<28}{number} {unit:<7}"
    return row if seconds is None else f"{row}{seconds:6.1f} s"
