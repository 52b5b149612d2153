"""`policy-search simulate`: requests on a virtual clock, on one machine or on several."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from offload.pages import PagePools
from offload.tiers import Tier, format_size
from policy_search.arrivals import poisson
from policy_search.capacity import LOWEST
from policy_search.errors import PolicyError
from policy_search.event_log import NO_LOG
from policy_search.exported_file import check_file
from policy_search.latency import Targets
from policy_search.policy import Policy
from policy_search.priced_machine import PricedMachine
from policy_search.scenario import MachineKind, Scenario, Split
from policy_search.simulate_flags import add_simulate_flags, check_simulate_flags
from policy_search.simulated_job import SimulatedJob
from policy_search.simulation import Simulation
from policy_search.simulation_export import export, make_export_directories
from policy_search.simulation_text import simulation_text
from policy_search.simulation_trace import FLAG as TRACE_FLAG
from policy_search.simulation_trace import TraceLog
from policy_search.simulator import run
from policy_search.split_search import SplitSearch
from policy_search.split_text import split_search_report

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from policy_search.simulated_job import LengthsOfFile
    from policy_search.simulated_machine import Scheduler

__all__ = ["add_simulate_flags", "run_simulate"]

NETWORK = 25e9
"""Bytes per second unless another speed is given: 200 Gbit/s, InfiniBand HDR."""
MOST_PAGES = 4_000_000
"""Each is an object in memory here, too."""


def run_simulate(
    arguments: argparse.Namespace,
    schedulers: Mapping[str, Callable[..., Scheduler]],
    lengths_of_file: LengthsOfFile,
) -> int:
    """Simulate a job and print what happened. Raises `FlexrunError`."""
    check_simulate_flags(arguments)
    if arguments.csv is not None:
        make_export_directories(arguments.csv)
    if arguments.trace_out is not None:
        check_file(arguments.trace_out, TRACE_FLAG)
    job = SimulatedJob.asked_for(arguments, lengths_of_file)
    machine = PricedMachine.asked_for(arguments, job)
    computing = PricedMachine.of_prompts(arguments, job)
    scenario = _scenario(arguments, machine, computing, job, schedulers[arguments.scheduler])
    targets = Targets(**{n: v for n in ("ttft", "tpot") if (v := getattr(arguments, n))})
    if arguments.find_split is not None:
        most = arguments.find_split
        search = SplitSearch(scenario, job.lengths, most, arguments.seed, targets)
        print(split_search_report(search, as_json=arguments.json))
        return 0
    requests, found = job.requests, dict[str, Any]()
    if arguments.max_rate:
        rate = scenario.highest_rate(job.lengths, arguments.seed, targets)
        found = {"max_rate": rate, "max_rate_per_device": rate / scenario.devices}
        requests = poisson(job.lengths, max(rate, LOWEST), arguments.seed)
    cluster = scenario.cluster()
    log = NO_LOG if arguments.trace_out is None else TraceLog()
    times = run(cluster, requests, log)
    given = arguments.ttft or arguments.tpot
    result = Simulation.of(cluster, requests, times, targets if given else None)
    if arguments.csv is not None:
        export(arguments.csv, cluster, requests, times)
    if isinstance(log, TraceLog):
        log.write(arguments.trace_out)
        found |= {"trace_note": log.note} if log.note else {}
    report = asdict(result) | found | _machine_report(arguments, machine, job.most_tokens)
    if computing is not None:
        most_tokens = _of_prompts(job)
        report["prompt_machine"] = _machine_report(arguments, computing, most_tokens)
    if arguments.json:
        print(json.dumps(report))
    else:
        print(_text(arguments, job, [machine, computing], report, result))
    return 0


def _of_prompts(job: SimulatedJob) -> list[int]:
    """Tokens that machines for prompts store of every request."""
    return [request.prompt + 1 for request in job.requests]


def _machine_report(
    arguments: argparse.Namespace, machine: PricedMachine, most_tokens: Sequence[int]
) -> dict[str, Any]:
    pages = _pages(arguments, machine, most_tokens)
    return {
        "max_rows": machine.max_rows,
        "sweep_weight_seconds": machine.weight_seconds,
        "kv_bytes": pages * Policy().page_tokens * machine.kv_token_bytes,
    }


def _pages(
    arguments: argparse.Namespace, machine: PricedMachine, most_tokens: Sequence[int]
) -> int:
    """Of one machine: for `--kv-tokens`, or as its plan has, or for the longest sequences that may
    run together.
    """
    page_tokens = Policy().page_tokens
    longest = sorted(most_tokens, reverse=True)[: machine.max_sequences]
    enough = sum(-(-tokens // page_tokens) + 1 for tokens in longest)
    given = machine.kv_tokens if arguments.kv_tokens is None else arguments.kv_tokens
    pages = enough if given is None else given // page_tokens
    if pages > MOST_PAGES:
        raise PolicyError(
            f"a KV cache of {pages * page_tokens} tokens is too large to simulate: at most "
            f"{MOST_PAGES * page_tokens}",
            hint="give --kv-tokens, or fewer --max-sequences",
        )
    if most_tokens and not PagePools({Tier.DEVICE: pages}, page_tokens).fits_ever(longest[0]):
        raise PolicyError(
            f"a request of up to {longest[0]} tokens does not fit into the KV cache of "
            f"{pages * page_tokens}",
            hint="raise --kv-tokens, lower --scale, or give --known-lengths",
        )
    return pages


def _kind(
    arguments: argparse.Namespace,
    machine: PricedMachine,
    most_tokens: Sequence[int],
    scheduler: Callable[..., Scheduler],
) -> MachineKind:
    pages = _pages(arguments, machine, most_tokens)

    def make_scheduler() -> Scheduler:
        return scheduler(
            PagePools({Tier.DEVICE: pages}, Policy().page_tokens),
            max_rows=machine.max_rows,
            max_sequences=machine.max_sequences,
            micro_batch_rows=machine.micro_batch_rows,
            order=arguments.order,
        )

    return MachineKind(make_scheduler=make_scheduler, cost=machine.cost, devices=machine.devices)


def _scenario(
    arguments: argparse.Namespace,
    machine: PricedMachine,
    computing: PricedMachine | None,
    job: SimulatedJob,
    scheduler: Callable[..., Scheduler],
) -> Scenario:
    split = None
    if arguments.split is not None or arguments.find_split is not None:
        prompt_machines, token_machines = arguments.split or (1, 1)
        prompt_kind = None
        if computing is not None:
            _check_same_values(machine, computing)
            prompt_kind = _kind(arguments, computing, _of_prompts(job), scheduler)
        split = Split(
            prompt_machines=prompt_machines,
            token_machines=token_machines,
            network=float(arguments.network or NETWORK),
            token_bytes=machine.kv_token_bytes,
            prompt_kind=prompt_kind,
        )
    return Scenario(
        kind=_kind(arguments, machine, job.most_tokens, scheduler),
        machines=arguments.machines or 1,
        split=split,
        routing=arguments.routing,
        max_tokens=job.max_tokens,
    )


def _check_same_values(machine: PricedMachine, computing: PricedMachine) -> None:
    if machine.kv_token_bytes != computing.kv_token_bytes:
        raise PolicyError(
            f"keys and values of a token take {computing.kv_token_bytes} bytes where prompts are "
            f"computed, and {machine.kv_token_bytes} where they are needed after that",
            hint="give both machines the same model and policies with the same KV bits",
        )


def _text(
    arguments: argparse.Namespace,
    job: SimulatedJob,
    machines: Sequence[PricedMachine | None],
    report: dict[str, Any],
    result: Simulation,
) -> str:
    lines = []
    if "max_rate" in report:
        lines.append(
            f"highest rate: {report['max_rate']:.3f} requests/s, "
            f"{report['max_rate_per_device']:.3f} per device. "
            f"At {max(report['max_rate'], LOWEST):.3f} requests/s:"
        )
    rows = "; prompts in those ".join(
        f"of up to {machine.max_rows} rows ({arguments.scheduler}), {machine.description}"
        for machine in machines
        if machine is not None
    )
    room = format_size(report["kv_bytes"])
    lines.append(simulation_text(result, job=job.source, sweeps=rows, room=room))
    return "\n".join(lines + ([report["trace_note"]] if "trace_note" in report else []))
