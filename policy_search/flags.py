"""How the commands of `policy-search` read their flags."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, NoReturn

from compression.errors import FlexrunError
from offload.tiers import parse_size
from policy_search.errors import PolicyError
from policy_search.policy import CHOICES, QUANTIZATION, Policy
from policy_search.workload import WORKLOADS, Workload


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


def add_quantization_flags(parser: argparse.ArgumentParser, *, kv_cache: bool = True) -> None:
    """The fields of a policy that say what is quantized, None where they are not given.

    Commands that have no `kv_cache` do not take its bits.
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


def quantized_policy(arguments: argparse.Namespace) -> Policy:
    """The default policy with what `add_quantization_flags` read. Raises `PolicyError`."""
    given = {name: getattr(arguments, name) for name in QUANTIZATION}
    return Policy(**{name: value for name, value in given.items() if value is not None})


def add_workload_flags(group: argparse._ActionsContainer, requests: int) -> None:
    """The fields of `Workload`; `requests` is the default of a job's size."""
    add = group.add_argument
    add("--workload", default="conv", choices=WORKLOADS, help="length table (%(default)s)")
    add("--requests", type=int, default=requests, metavar="N", help="of the job (%(default)s)")
    add("--scale", type=float, default=1.0, metavar="X", help="multiplies all lengths")
    add("--prompt-len", type=count, default=512, metavar="N", help="of fixed lengths (%(default)s)")
    add("--gen-len", type=count, default=32, metavar="N", help="likewise (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of what is drawn (%(default)s)")
    text = "tell the scheduler each output's length; else only the longest one there may be"
    add("--known-lengths", action="store_true", help=text)


def workload(arguments: argparse.Namespace) -> Workload:
    """What `add_workload_flags` read. Raises `PolicyError`."""
    return Workload(**{field.name: getattr(arguments, field.name) for field in fields(Workload)})
