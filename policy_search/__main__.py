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
from policy_search.automatic import automatic_policy
from policy_search.errors import PolicyError
from policy_search.flags import Parser, add_quantization_flags, count, quantized_policy, size
from policy_search.machine import disk_budget, gpu_budget, host_budget
from policy_search.memory import default_max_rows, default_max_sequences, memory_of
from policy_search.model_config import ModelConfig
from policy_search.plan_text import command_line, plan_text
from policy_search.shape_from_config import shape_from_config
from policy_search.simulate_command import add_simulate_flags, run_simulate

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
    add_quantization_flags(parser)
    add("--unified", action="store_true", help="the CPU computes: all memory is RAM")
    add("-o", "--output", type=Path, metavar="FILE", help="write the policy for `flexrun --policy`")
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser


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
    stored, computed = config.types(arguments.dtype, unified=unified)
    quantized = quantized_policy(arguments)
    shape = shape_from_config(config, stored, computed, quantized.quantization)
    rows = default_max_rows(shape, limits[Tier.DEVICE])
    sequences = default_max_sequences(shape, limits[Tier.DEVICE])
    base = replace(quantized, max_rows=rows, max_sequences=sequences).with_batch(
        micro_batch_rows=arguments.micro_batch,
        max_rows=arguments.max_rows,
        max_sequences=arguments.max_sequences,
    )
    context = arguments.context or config.context_length
    policy = automatic_policy(shape, limits, base, context, unified=unified)
    memory = memory_of(shape, policy, limits, context, unified=unified)
    if arguments.output is not None:
        _write(arguments.output, policy)
    if arguments.json:
        print(json.dumps({"policy": json.loads(policy.to_json()), "memory": _plain(memory)}))
        return DONE
    print(f"{config.directory.resolve().name}, {stored}, on {'a CPU' if unified else 'a GPU'}")
    print(plan_text(shape, policy, memory, unified=unified))
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
