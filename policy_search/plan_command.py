"""`policy-search --model …`: find a plan, and print or write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy_search.advice import advise
from policy_search.errors import PolicyError
from policy_search.flags import (
    add_machine_flags,
    add_quantization_flags,
    add_workload_flags,
    count,
    quantized_policy,
    workload,
)
from policy_search.goal import Goal
from policy_search.least_memory import with_least_memory
from policy_search.named_models import NAMED_MODELS, named_config
from policy_search.plan_text import advice_line, command_line, comparison, plan_text
from policy_search.planned_machine import planned_machine
from policy_search.planner import Planner
from policy_search.rivals import rivals
from policy_search.workload import JobLengths, Workload

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from policy_search.bits import BitsChoice
    from policy_search.machine_spec import MachineSpec
    from policy_search.memory import TierMemory
    from policy_search.model_config import ModelConfig
    from policy_search.planner import Plan
    from policy_search.policy import Policy


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `policy-search`."""
    add = parser.add_argument
    text = f"local directory with config.json, or one of {', '.join(NAMED_MODELS)}"
    add("--model", required=True, metavar="MODEL", help=text)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help="type of weights and compute (%(default)s)")
    add_machine_flags(parser)
    number: dict[str, Any] = {"type": count}
    batch = parser.add_argument_group("batch", "What is not given is searched for.")
    batch.add_argument(
        "--context", **number, metavar="TOKENS", help="longest sequence; default: the model's"
    )
    batch.add_argument("--max-sequences", **number, metavar="N", help="most running at once")
    batch.add_argument("--max-rows", **number, metavar="ROWS", help="most rows of one sweep")
    batch.add_argument("--micro-batch", **number, metavar="ROWS", help="most rows in a layer call")
    add_quantization_flags(parser, planned=True)
    _add_job_flags(parser)
    add("-o", "--output", type=Path, metavar="FILE", help="write the policy for `flexrun --policy`")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--compare", action="store_true", help="beside simpler plans for the same batch")
    text = "throughput over latency and a roofline, as an image (needs matplotlib)"
    add("--plot", type=Path, metavar="FILE", help=text)


def _add_job_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("job", "Its lengths decide about the batch.")
    add_workload_flags(group, requests=Workload().requests, scheduled=False)
    add = group.add_argument
    add("--input", type=Path, metavar="FILE", help="prompts of this JSONL instead of a table")
    text = "tokens that each prompt of --input may generate where it does not say (%(default)s)"
    add("--max-tokens", type=count, default=256, metavar="N", help=text)
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    add("--max-latency", **seconds, help="that a request may take")
    add("--deadline", **seconds, help="for the whole job")
    text = "take the least RAM that meets the deadline, or gives 95 %% of the throughput"
    add("--minimize", choices=["memory"], help=text)


def run_plan(arguments: argparse.Namespace, lengths_of: Callable[..., JobLengths | None]) -> int:
    """Plan, and print or write the plan; `lengths_of` reads a file. Raises `FlexrunError`."""
    config = named_config(arguments.model)
    machine = planned_machine(arguments, config)
    planner = Planner(
        config=config,
        dtype=arguments.dtype,
        limits=machine.limits,
        unified=machine.unified,
        context=arguments.context or config.context_length,
        batch={
            "micro_batch_rows": arguments.micro_batch,
            "max_rows": arguments.max_rows,
            "max_sequences": arguments.max_sequences,
        },
        job=_job(arguments, config, lengths_of),
        hardware=machine.hardware,
        machine_key=machine.key,
        goal=Goal(max_latency=arguments.max_latency, deadline=arguments.deadline),
    )
    plan, bits = _plan(planner, quantized_policy(arguments), arguments)
    if arguments.output is not None:
        _write(arguments.output, plan.policy)
    if arguments.plot is not None:
        from policy_search.plot import plot_plan  # matplotlib takes a second

        plot_plan(plan, machine, arguments.plot)
    report = _json if arguments.json else _text
    print(report(plan, bits, machine, arguments))
    return 0


def _plan(
    planner: Planner, quantized: Policy, arguments: argparse.Namespace
) -> tuple[Plan, BitsChoice | None]:
    if arguments.minimize and arguments.allow_quantization:
        raise PolicyError(
            "--minimize plans for given bits", hint="give --weight-bits and --kv-bits instead"
        )
    if arguments.minimize:
        return with_least_memory(planner, quantized), None
    if not arguments.allow_quantization:
        return planner.plan(quantized), None
    bits, plan = planner.choose(quantized, arguments.weight_bits, arguments.kv_bits)
    return plan, bits


def _job(
    arguments: argparse.Namespace,
    config: ModelConfig,
    lengths_of: Callable[..., JobLengths | None],
) -> JobLengths:
    context = arguments.context or config.context_length
    if arguments.input is not None:
        job = lengths_of(arguments.input, config.directory, arguments.max_tokens, context)
    else:
        table = workload(arguments)
        job = table.job() if table.requests else None
    if job is None:
        raise PolicyError("a job without requests needs no plan", hint="raise --requests")
    return job.within(context)


def _text(
    plan: Plan, bits: BitsChoice | None, machine: MachineSpec, arguments: argparse.Namespace
) -> str:
    name = Path(arguments.model).name
    stored = plan.policy.weight_bits
    kind = f"weights in {stored} bits, " if stored < 16 else ""
    lines = [f"{name}, {kind}on {machine.name} ({machine.source.split(';')[0]})", plan_text(plan)]
    lines.append(advice_line(advise(plan.search, _goal(arguments), plan.best)))
    if bits is not None:
        lines.append(bits.text(plan.search.job, plan.search.hardware))
    if arguments.compare:
        lines.append(comparison({"this plan": plan.best, **rivals(plan)}))
    here = Path(arguments.model).expanduser().is_dir()  # else it has to be downloaded first
    command = command_line(
        arguments.model if here else f"path/to/{name}",
        arguments.dtype,
        plan,
        device="cpu" if machine.unified else "cuda",
        offload_dir=arguments.offload_dir,
    )
    return "\n".join([*lines, "", "to run it:", "", f"  {command}"])


def _json(
    plan: Plan, bits: BitsChoice | None, machine: MachineSpec, arguments: argparse.Namespace
) -> str:
    job = plan.search.job
    plain: dict[str, Any] = {
        "policy": json.loads(plan.policy.to_json()),
        "predicted": plan.prediction.as_json(),
        "memory": {t.value: _memory(used) for t, used in plan.memory.items()},
        "bound": plan.prediction.bound,
        "machine": machine.name,
        "job": {"sequences": job.sequences, "prompt": job.prompt, "output": job.output},
    }
    if bits is not None:
        plain["bits"] = bits.as_json(job)
    if arguments.compare:
        plain["compared"] = {
            name: None if each is None else each.prediction.as_json()
            for name, each in rivals(plan).items()
        }
    return json.dumps(plain)


def _memory(used: TierMemory) -> dict[str, int]:
    names = ("weights", "kv", "working", "elsewhere", "capacity")
    return {name: getattr(used, name) for name in names} | {"used": used.capacity - used.free}


def _goal(arguments: argparse.Namespace) -> Goal:
    return Goal(max_latency=arguments.max_latency, deadline=arguments.deadline)


def _write(path: Path, policy: Policy) -> None:
    try:
        path.write_text(policy.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise PolicyError(
            f"cannot write {path}: {error.strerror or error}", hint="give another file with -o"
        ) from error
