"""The command `policy-search`: what the engine would put where, and how long a job would take.

In under a second, without torch.

Exit codes: 0 there is a plan, 2 wrong usage, or a model that does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression.errors import FlexrunError
from offload.tiers import Tier
from policy_search.errors import PolicyError
from policy_search.flags import (
    Parser,
    add_quantization_flags,
    add_speed_flags,
    add_workload_flags,
    count,
    quantized_policy,
    size,
    stated_hardware,
    workload,
)
from policy_search.machine import disk_budget, gpu_budget, host_budget
from policy_search.model_config import ModelConfig
from policy_search.plan_text import command_line, plan_text
from policy_search.planner import Planner
from policy_search.simulate_command import add_simulate_flags, run_simulate
from policy_search.workload import JobLengths, Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from policy_search.memory import TierMemory
    from policy_search.policy import Policy

DONE, BAD_USAGE = 0, 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of `policy-search`."""
    parser = Parser(
        prog="policy-search",
        description="Say where weights and KV cache of a model go on this machine, or on one with "
        "the memory given here. No weight is read. The same plan is made by `flexrun generate` "
        "without --weights and --kv-cache.",
        epilog="`policy-search simulate --help`: a job of published lengths on a virtual clock.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="local directory with config.json")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help="type of weights and compute (%(default)s)")
    nbytes: dict[str, Any] = {"type": size, "metavar": "SIZE"}
    add("--device-memory", **nbytes, help="such as 16GiB; default: what the GPU (or RAM) has free")
    add("--host-memory", **nbytes, help="RAM beside a GPU; default: what is free")
    add("--disk-space", **nbytes, help="default: what is free on the offload directory's disk")
    add("--offload-dir", type=Path, metavar="DIR", help="directory for what lives on disk")
    number: dict[str, Any] = {"type": count}
    add("--context", **number, metavar="TOKENS", help="longest sequence; default: the model's")
    add("--max-sequences", **number, metavar="N", help="most sequences running at once")
    add("--max-rows", **number, metavar="ROWS", help="most rows of one sweep")
    add("--micro-batch", **number, metavar="ROWS", help="most rows in one layer call")
    add_quantization_flags(parser, planned=True)
    _add_prediction_flags(parser)
    add("--unified", action="store_true", help="the CPU computes: all memory is RAM")
    add("-o", "--output", type=Path, metavar="FILE", help="write the policy for `flexrun --policy`")
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _add_prediction_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "prediction", "The job and the machine that --allow-quantization chooses bits for."
    )
    add_workload_flags(group, requests=Workload().requests, scheduled=False)
    add_speed_flags(group, placed=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["simulate"]:
            return simulate(words[1:])
        return run(build_parser().parse_args(words))
    except FlexrunError as error:
        print(f"policy-search: error: {error}", file=sys.stderr)
        return BAD_USAGE


def simulate(words: Sequence[str]) -> int:
    """Run a simulation's command line. Raises `FlexrunError`."""
    from flexrun.schedulers import SCHEDULERS  # an entry point wires packages together

    parser = Parser(
        prog="policy-search simulate",
        description="Run a job of published lengths on a virtual clock: the scheduler and the KV "
        "pages of the engine, with each sweep's time from the cost model. No model is loaded.",
        allow_abbrev=False,
    )
    add_simulate_flags(parser)
    return run_simulate(parser.parse_args(words), SCHEDULERS)


def run(arguments: argparse.Namespace) -> int:
    """Plan, and print or write the plan. Raises `FlexrunError`."""
    limits, unified = budgets(arguments)
    config = ModelConfig.load(_directory(arguments.model))
    planner = Planner(
        config=config,
        dtype=arguments.dtype,
        limits=limits,
        unified=unified,
        context=arguments.context or config.context_length,
        batch={
            "micro_batch_rows": arguments.micro_batch,
            "max_rows": arguments.max_rows,
            "max_sequences": arguments.max_sequences,
        },
    )
    quantized, why, bits = quantized_policy(arguments), "", None
    if arguments.allow_quantization:
        quantized, why, bits = _with_chosen_bits(planner, quantized, arguments)
    shape, policy, memory = planner.plan(quantized)
    if arguments.output is not None:
        _write(arguments.output, policy)
    if arguments.json:
        plain = {"policy": json.loads(policy.to_json()), "memory": _plain(memory)}
        print(json.dumps(plain if bits is None else plain | {"bits": bits}))
        return DONE
    stored, _ = config.types(arguments.dtype, unified=unified)
    print(f"{config.directory.resolve().name}, {stored}, on {'a CPU' if unified else 'a GPU'}")
    print(plan_text(shape, policy, memory, unified=unified))
    if why:
        print(why)
    command = command_line(
        arguments.model,
        arguments.dtype,
        policy,
        memory,
        unified=unified,
        offload_dir=arguments.offload_dir,
    )
    print(f"\nto run it:\n\n  {command}")
    return DONE


def _with_chosen_bits(
    planner: Planner, quantized: Policy, arguments: argparse.Namespace
) -> tuple[Policy, str, dict[str, Any]]:
    """`quantized` with the bits that are best for the job; why, for people and for programs."""
    lengths = workload(arguments).lengths()
    if not lengths:
        raise PolicyError("a job without requests needs no plan", hint="raise --requests")
    job = JobLengths.of(lengths).within(planner.context)
    hardware = stated_hardware(arguments, unified=planner.unified)
    given = arguments.weight_bits, arguments.kv_bits
    found = planner.choose(quantized, *given, job, hardware)
    bits = found.chosen.weight_bits, found.chosen.kv_bits
    quantized = replace(quantized, weight_bits=bits[0], kv_bits=bits[1])
    return quantized, found.text(job, hardware), found.as_json(job)


def budgets(arguments: argparse.Namespace) -> tuple[dict[Tier, int], bool]:
    """Bytes per tier, and whether DEVICE is the RAM. What is not given is what is free here."""
    device: int | None = arguments.device_memory
    host: int | None = arguments.host_memory
    disk: int | None = arguments.disk_space
    if device is None and not arguments.unified:
        device = gpu_budget()
    unified = arguments.unified or device is None
    if unified and host is not None:
        # One memory with two names: the plan must fit into both.
        device = host if device is None else min(device, host)
    device = host_budget() if device is None else device
    host = host_budget() if host is None else host
    disk = disk_budget(arguments.offload_dir) if disk is None else disk
    return {Tier.DEVICE: device, Tier.HOST: host, Tier.DISK: disk}, unified


def _directory(model: str) -> Path:
    path = Path(model).expanduser()
    if not path.is_dir():
        raise PolicyError(
            f"--model {model} is not a directory",
            hint="give the local directory with the model's config.json; a model of the hub is "
            "downloaded by `hf download NAME --local-dir DIR` (config.json alone is enough for "
            "common architectures)",
        )
    return path


def _write(path: Path, policy: Policy) -> None:
    try:
        path.write_text(policy.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise PolicyError(
            f"cannot write {path}: {error.strerror or error}", hint="give another file with -o"
        ) from error


def _plain(memory: dict[Tier, TierMemory]) -> dict[str, dict[str, int]]:
    names = ("weights", "kv", "working", "capacity", "elsewhere")
    return {t.value: {name: getattr(used, name) for name in names} for t, used in memory.items()}


if __name__ == "__main__":
    sys.exit(main())
