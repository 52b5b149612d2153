"""How the commands of `policy-search` read their flags."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from compression.errors import FlexrunError
from offload.tiers import parse_size
from policy_search.errors import PolicyError
from policy_search.hardware import Hardware
from policy_search.policy import CHOICES, QUANTIZATION, Policy
from policy_search.presets import PRESETS
from policy_search.workload import WORKLOADS, Workload

AUTO = "auto"
"""The machine that the command runs on."""


class Parser(argparse.ArgumentParser):
    """Reports what it cannot read like every other wrong setting."""

    def error(self, message: str) -> NoReturn:
        raise PolicyError(message, hint=f"see {self.prog} --help")


def size(text: str) -> int:
    """Bytes, such as 16GiB; a speed may say that it is per second."""
    try:
        return parse_size(text.removesuffix("/s"))
    except FlexrunError as error:
        raise argparse.ArgumentTypeError(f"{error.message} ({error.hint})") from None


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_quantization_flags(
    parser: argparse.ArgumentParser, *, kv_cache: bool = True, planned: bool = False
) -> None:
    """The fields of a policy that say what is quantized, None where they are not given.

    Commands that have no `kv_cache` do not take its bits. Those that make a plan for a job
    (`planned`) may be allowed to choose bits.
    """
    what = "weights or the KV cache" if kv_cache else "weights"
    text = f"Store {what} in fewer bits, which changes results: off unless asked for."
    add = parser.add_argument_group("quantization", text).add_argument
    bits: dict[str, Any] = {"type": int, "choices": CHOICES["weight_bits"]}
    add("--weight-bits", **bits, help="of the matrices of layers; 4 and 8 in groups (16)")
    add("--head-bits", **bits, help="of the output head and the embedding table (16)")
    if kv_cache:
        text = "of keys and values, but for each sequence's first and newest page; 4 in groups (16)"
        add("--kv-bits", type=int, choices=CHOICES["kv_bits"], help=text)
    sizes = CHOICES["group_size"]
    add("--group-size", type=int, choices=sizes, help="values that share a scale (64)")
    text = "do not quantize tensors in whose names this is found"
    add("--keep", metavar="REGEX", help=text)
    if planned:
        text = (
            "plan for 16, 8 and 4 bits where --weight-bits and --kv-bits are not given, and take "
            "what is predicted to be fastest; fewer bits have to be 5 %% faster"
        )
        add("--allow-quantization", action="store_true", help=text)


def quantized_policy(arguments: argparse.Namespace) -> Policy:
    """The default policy with what `add_quantization_flags` read. Raises `PolicyError`."""
    given = {name: getattr(arguments, name) for name in QUANTIZATION}
    return Policy(**{name: value for name, value in given.items() if value is not None})


def add_workload_flags(
    group: argparse._ActionsContainer, requests: int, *, scheduled: bool = True
) -> None:
    """The fields of `Workload`; `requests` is the default of a job's size.

    Where nothing is `scheduled`, it does not matter what a scheduler knows.
    """
    add = group.add_argument
    text = f"length table ({Workload().workload}; with --prompt-len or --gen-len, fixed)"
    add("--workload", choices=WORKLOADS, help=text)
    add("--requests", type=int, default=requests, metavar="N", help="of the job (%(default)s)")
    add("--scale", type=float, default=1.0, metavar="X", help="multiplies all lengths")
    lengths = Workload().prompt_len, Workload().gen_len
    add("--prompt-len", type=count, metavar="N", help=f"of fixed lengths ({lengths[0]})")
    add("--gen-len", type=count, metavar="N", help=f"likewise ({lengths[1]})")
    add("--seed", type=int, default=0, metavar="S", help="of what is drawn (%(default)s)")
    if not scheduled:
        group.set_defaults(known_lengths=Workload().known_lengths)
        return
    text = "tell the scheduler each output's length; else only the longest one there may be"
    add("--known-lengths", action="store_true", help=text)


def workload(arguments: argparse.Namespace) -> Workload:
    """What `add_workload_flags` read. Raises `PolicyError`."""
    given = {field.name: getattr(arguments, field.name) for field in fields(Workload)}
    known = {name: value for name, value in given.items() if value is not None}
    if {"prompt_len", "gen_len"} & known.keys():
        known.setdefault("workload", "fixed")
    return Workload(**known)


def add_speed_flags(group: argparse._ActionsContainer, *, placed: bool = False) -> None:
    """What the machine can do; `placed`: also what only matters where it is known what lives where.

    None where it is not given: see `stated_hardware`.
    """
    add, nbytes = group.add_argument, dict[str, Any]({"type": size, "metavar": "SIZE"})
    add("--link", **nbytes, help="per second, to the device (25GB)")
    if placed:
        add("--disk-read", **nbytes, help="per second, of weights on disk (2GB)")
        text = "per second, of pages on host that the processor attends to (50GB)"
        add("--host-attention", **nbytes, help=text)
    text = "per second, of quantized weights that are expanded (500GB; each core of a CPU: 6GB)"
    add("--expansion", **nbytes, help=text)
    if placed:
        text = "per second, of matrices that the device multiplies few rows with (1TB; a core: 5GB)"
        add("--matrix-read", **nbytes, help=text)
    text = "of products on the device (100; each core of a CPU: 0.05)"
    add("--tflops", type=float, metavar="TFLOP/S", help=text)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """The machine to plan for; see `planned_machine`."""
    group = parser.add_argument_group("machine")
    add, nbytes = group.add_argument, dict[str, Any]({"type": size, "metavar": "SIZE"})
    text = (
        "auto: this one, as `policy-search calibrate` has measured it; a FILE.json that it has "
        f"written; or one of {', '.join(PRESETS)} (%(default)s)"
    )
    add("--hardware", default=AUTO, metavar="NAME", help=text)
    add("--device-memory", **nbytes, help="such as 16GiB; default: what the GPU (or RAM) has free")
    add("--host-memory", **nbytes, help="RAM beside a GPU; default: what is free")
    add("--disk-space", **nbytes, help="default: what is free on the offload directory's disk")
    add("--offload-dir", type=Path, metavar="DIR", help="directory for what lives on disk")
    add("--unified", action="store_true", help="the CPU computes: all memory is RAM")
    add_speed_flags(group, placed=True)


def stated_hardware(arguments: argparse.Namespace, *, unified: bool = False) -> Hardware:
    """What `add_speed_flags` read; what was not given is a common GPU's, or of the CPU's cores.

    Raises `PolicyError`.
    """
    cores = os.cpu_count() or 1
    speeds = {
        "link": 25e9,
        "disk_read": 2e9,
        "host_attention": 50e9,
        "expansion": 6e9 * cores if unified else 500e9,
        "matrix_read": 5e9 * cores if unified else 1e12,
        "tflops": 0.05 * cores if unified else 100.0,
    } | checked_speeds(arguments)
    return Hardware(
        host_to_device=speeds["link"],
        device_to_host=speeds["link"],
        disk_write=speeds["disk_read"] / 2,
        device_attention=speeds["matrix_read"],
        disk_read=speeds["disk_read"],
        host_attention=speeds["host_attention"],
        expansion=speeds["expansion"],
        matrix_read=speeds["matrix_read"],
        flops=speeds["tflops"] * 1e12,
    )


def checked_speeds(arguments: argparse.Namespace) -> dict[str, float]:
    """Those that are given, by the names of their flags. Raises `PolicyError`."""
    found = {}
    names = ("link", "disk_read", "host_attention", "expansion", "matrix_read", "tflops")
    for name in names:
        given, least = getattr(arguments, name, None), 1e-6 if name == "tflops" else 1
        if given is None:
            continue
        if not least <= given < math.inf:
            flag = name.replace("_", "-")
            raise PolicyError(
                f"--{flag} must be at least {least:g}, not {given}",
                hint="leave it out for what is known of the machine",
            )
        found[name] = float(given)
    return found
