"""The flags of `policy-search simulate`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from policy_search.capacity import SHARE
from policy_search.cluster import ROUTINGS
from policy_search.errors import PolicyError
from policy_search.flags import (
    AUTO,
    add_machine_flags,
    add_quantization_flags,
    add_workload_flags,
    count,
    size,
)
from policy_search.policy import CHOICES
from policy_search.priced_machine import MAX_SEQUENCES
from policy_search.profiles import PROFILES
from policy_search.workload import Workload


def add_simulate_flags(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    add_workload_flags(parser, requests=Workload().requests)
    _add_request_flags(parser.add_argument_group("requests", "Other than from a length table."))
    add = parser.add_argument
    schedulers, orders = CHOICES["scheduler"], CHOICES["order"]
    add("--scheduler", default=schedulers[0], choices=schedulers, help="(%(default)s)")
    add("--order", default=orders[0], choices=orders, help="of waiting requests (%(default)s)")
    text = f"running at once (the policy's, or {MAX_SEQUENCES})"
    add("--max-sequences", type=count, metavar="N", help=text)
    text = "most rows of a sweep; default: those that compute while the weights arrive"
    add("--max-rows", type=count, metavar="ROWS", help=text)
    text = "room of the KV cache; default: for every running sequence's most tokens"
    add("--kv-tokens", type=count, metavar="TOKENS", help=text)
    text = "directory with config.json, or a model that policy-search knows (Llama-2-13B, float16)"
    add("--model", metavar="MODEL", help=text)
    text = "weights that travel in every sweep; default: all of them"
    add("--streamed", type=size, metavar="SIZE", help=text)
    text = "published measurements of a machine and its model, instead of --model and speeds"
    add("--profile", choices=PROFILES, help=text)
    text = "of `policy-search -o`: what lives where on the machine, with every term of its sweeps"
    add("--policy", type=Path, metavar="FILE", help=text)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help="type of weights and compute (%(default)s)")
    add_machine_flags(parser)
    _add_machine_flags(parser.add_argument_group("machines", "Each with a KV cache of its own."))
    _add_result_flags(parser.add_argument_group("results"))
    add_quantization_flags(parser)


def _add_request_flags(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    text = "lengths and arrival times: a CSV file with the columns of Splitwise, Vidur or Azure"
    add("--trace", type=Path, metavar="FILE", help=text)
    text = "prompts, a JSONL file as for `flexrun generate`"
    add("--input", type=Path, metavar="FILE", help=text)
    text = "leave out requests of more tokens, which a model of this context cannot serve"
    add("--context", type=count, metavar="TOKENS", help=text)
    text = "requests per second that arrive, at random; default: all are there at once"
    add("--rate", type=_positive, metavar="R", help=text)


def _add_machine_flags(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add("--machines", type=count, metavar="N", help="that do the same (1)")
    text = "P machines compute prompts and D generate"
    add("--split", type=_split, metavar="P:D", help=text)
    text = "of the P machines, if they are of another kind than the D: like --{0}"
    add("--prompt-profile", choices=PROFILES, help=text.format("profile"))
    add("--prompt-hardware", metavar="NAME", help=text.format("hardware"))
    add("--prompt-policy", type=Path, metavar="FILE", help=text.format("policy"))
    text = "per second, between the machines of --split or --find-split (25GB)"
    add("--network", type=size, metavar="SIZE", help=text)
    text = "to the machine with the fewest pending tokens, or round robin (%(default)s)"
    add("--routing", default=ROUTINGS[0], choices=ROUTINGS, help=text)


def _add_result_flags(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    seconds: dict[str, Any] = {"type": _positive, "metavar": "SECONDS"}
    add("--ttft", **seconds, help="that a request may take to its first token, to count as served")
    add("--tpot", **seconds, help="from token to token after that, on average")
    text = f"find the highest rate at which {SHARE:.0%} of the requests meet --ttft and --tpot"
    add("--max-rate", action="store_true", help=text.replace("%", "%%"))
    text = (
        "the same of up to N machines in the best split, beside machines that do everything with "
        "as many devices"
    )
    add("--find-split", type=_at_least_two, metavar="N", help=text)
    add("--trace-out", type=Path, metavar="FILE", help="write a Chrome trace")
    text = "write summary.csv, detailed/ and request_nodes.csv, with Splitwise's columns"
    add("--csv", type=Path, metavar="DIR", help=text)
    add("--json", action="store_true", help="print one JSON object instead of text")


_PROMPT_MACHINE = ("prompt_profile", "prompt_hardware", "prompt_policy")


def check_simulate_flags(arguments: argparse.Namespace) -> None:
    """Raise `PolicyError` if some contradict each other."""
    given = {name: value for name, value in vars(arguments).items() if value not in (None, False)}
    _refuse_together(given, "trace", ["input", "rate", "max_rate", "find_split"])
    for name in ("trace", "input"):
        if name in given:
            _refuse_table(arguments, name)
    searches = ["max_rate", "find_split"]
    for name in searches:
        _refuse_together(given, name, ["rate", "trace_out", "csv"])
    _refuse_together(given, "find_split", ["max_rate", "machines", "split"])
    _refuse_together(given, "machines", ["split"])
    if given["hardware"] == AUTO:
        del given["hardware"]
    prompts = ["prompt_hardware", "prompt_policy"]
    speeds = ["link", "expansion", "tflops", "hardware"]
    bits = ["weight_bits", "head_bits", "kv_bits", "group_size", "keep"]
    _refuse_together(given, "profile", ["model", "streamed", "policy", *speeds, *bits, *prompts])
    _refuse_together(given, "policy", ["streamed", *bits])
    _check_split_flags(given)
    for name in searches:
        if name in given and not given.keys() & {"ttft", "tpot"}:
            flag = name.replace("_", "-")
            raise PolicyError(
                f"--{flag} needs to know what is too slow", hint="give --ttft, --tpot or both"
            )


def _check_split_flags(given: dict[str, Any]) -> None:
    """What is said of machines for prompts needs a split, and others to go on."""
    for name in ("network", *_PROMPT_MACHINE):
        if name in given and not given.keys() & {"split", "find_split"}:
            flag = name.replace("_", "-")
            raise PolicyError(f"--{flag} is of the machines of --split", hint="give --split P:D")
    for name in ("profile", "policy"):
        if f"prompt_{name}" in given and name not in given:
            raise PolicyError(
                f"--prompt-{name} is of some machines, and nothing is known of the others",
                hint=f"give --{name}, too",
            )
    if "prompt_profile" in given:
        one, other = (PROFILES[given[name]].model for name in ("prompt_profile", "profile"))
        if one != other:
            raise PolicyError(
                f"--prompt-profile is of {one}, and --profile of {other}",
                hint="give profiles of the same model",
            )


def _refuse_table(arguments: argparse.Namespace, name: str) -> None:
    """Lengths come from a file: what says how to draw them must not be given."""
    fields = ["workload", "requests", "scale", "prompt_len"]
    default = Workload()
    for field in fields + ["gen_len"] * (name == "trace"):
        if getattr(arguments, field) not in (None, getattr(default, field)):
            flag = field.replace("_", "-")
            raise PolicyError(
                f"--{flag} is for length tables, and --{name} gives lengths",
                hint="leave one of them out",
            )


def _refuse_together(given: dict[str, Any], name: str, others: list[str]) -> None:
    for other in others:
        if name in given and other in given:
            one, two = ("--" + each.replace("_", "-") for each in (name, other))
            raise PolicyError(f"{one} and {two} exclude each other", hint="leave one of them out")


def _split(text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, such as 1:3")
    return count(parts[0]), count(parts[1])


def _at_least_two(text: str) -> int:
    if (machines := count(text)) < 2:
        raise argparse.ArgumentTypeError("one machine cannot be split: give at least 2")
    return machines


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
