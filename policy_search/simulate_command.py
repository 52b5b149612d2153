"""`policy-search simulate`: a job of published lengths on a virtual clock."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.pages import PagePools
from offload.tiers import Tier, format_size
from policy_search.cost_model import (
    free_rows,
    weight_seconds,
)
from policy_search.errors import PolicyError
from policy_search.flags import (
    add_quantization_flags,
    add_speed_flags,
    add_workload_flags,
    count,
    quantized_policy,
    size,
    stated_hardware,
    workload,
)
from policy_search.model_config import ModelConfig
from policy_search.named_models import NAMED_MODELS
from policy_search.operators import compute_seconds, expansion_seconds
from policy_search.policy import CHOICES, Policy
from policy_search.shape_from_config import shape_from_config
from policy_search.simulator import simulate
from policy_search.workload import Workload

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from compression.selection import Quantization
    from policy_search.model_shape import ModelShape
    from policy_search.simulator import Scheduler, Simulation


_DEFAULT = "llama-2-13b"
"""The model that is simulated unless another one is given."""


def add_simulate_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `policy-search simulate`."""
    add = parser.add_argument
    add_workload_flags(parser, requests=Workload().requests)
    schedulers, orders = CHOICES["scheduler"], CHOICES["order"]
    add("--scheduler", default=schedulers[0], choices=schedulers, help="(%(default)s)")
    add("--order", default=orders[0], choices=orders, help="of waiting requests (%(default)s)")
    add(
        "--max-sequences", type=count, default=64, metavar="N", help="running at once (%(default)s)"
    )
    text = "most rows of a sweep; default: those that compute while the weights arrive"
    add("--max-rows", type=count, metavar="ROWS", help=text)
    text = "room of the KV cache; default: for every running sequence's most tokens"
    add("--kv-tokens", type=count, metavar="TOKENS", help=text)
    add("--model", type=Path, metavar="DIR", help="with config.json; default: Llama-2-13B, float16")
    text = "weights that travel in every sweep; default: all of them"
    add("--streamed", type=size, metavar="SIZE", help=text)
    add_speed_flags(parser)
    add("--json", action="store_true", help="print one JSON object instead of text")
    add_quantization_flags(parser)


def run_simulate(
    arguments: argparse.Namespace, schedulers: Mapping[str, Callable[..., Scheduler]]
) -> int:
    """Simulate a job and print what happened. Raises `FlexrunError`."""
    job = workload(arguments)
    hardware = stated_hardware(arguments)
    shape = _shape(arguments.model, quantized_policy(arguments).quantization)
    streamed = shape.weight_bytes if arguments.streamed is None else arguments.streamed
    arriving = weight_seconds(streamed, 0, hardware)
    expanding = expansion_seconds(shape, hardware)
    max_rows = arguments.max_rows or max(
        arguments.max_sequences + 1, int(free_rows(shape, hardware, arriving))
    )

    def seconds(rows: int, positions: int) -> float:
        return max(arriving, expanding + compute_seconds(shape, hardware, rows, positions))

    lengths, most = job.lengths(), job.max_tokens
    pools = _pools(arguments, [each.prompt + (most or each.output) for each in lengths])
    scheduler = schedulers[arguments.scheduler](
        pools,
        max_rows=max_rows,
        max_sequences=arguments.max_sequences,
        micro_batch_rows=Policy().micro_batch_rows,
        order=arguments.order,
    )
    result = simulate(scheduler, lengths, seconds, max_tokens=most)
    report = asdict(result) | {"max_rows": max_rows, "sweep_weight_seconds": arriving}
    kv_tokens = pools.capacity[Tier.DEVICE] * pools.page_tokens
    report["kv_bytes"] = kv_tokens * shape.kv_token_bytes
    print(json.dumps(report) if arguments.json else _text(arguments, report, result, streamed))
    return 0


def _shape(model: Path | None, quantization: Quantization) -> ModelShape:
    config = NAMED_MODELS[_DEFAULT] if model is None else ModelConfig.load(model.expanduser())
    stored, computed = config.types("auto", unified=False)
    return shape_from_config(config, stored, computed, quantization)


def _pools(arguments: argparse.Namespace, most_tokens: Sequence[int]) -> PagePools:
    """Pages on one tier: for `--kv-tokens`, or for the longest sequences that may run together."""
    page_tokens = Policy().page_tokens
    longest = sorted(most_tokens, reverse=True)[: arguments.max_sequences]
    enough = sum(-(-tokens // page_tokens) + 1 for tokens in longest)
    pages = enough if arguments.kv_tokens is None else arguments.kv_tokens // page_tokens
    pools = PagePools({Tier.DEVICE: pages}, page_tokens)
    if most_tokens and not pools.fits_ever(longest[0]):
        raise PolicyError(
            f"a request of up to {longest[0]} tokens does not fit into the KV cache of "
            f"{pages * page_tokens}",
            hint="raise --kv-tokens, lower --scale, or give --known-lengths",
        )
    return pools


def _text(
    arguments: argparse.Namespace, report: dict[str, Any], result: Simulation, streamed: int
) -> str:
    return (
        f"{result.requests} requests ({arguments.workload}), {result.prompt_tokens} prompt tokens, "
        f"{result.generated_tokens} generated\n"
        f"{arguments.scheduler}: {result.sweeps} sweeps of up to {report['max_rows']} rows, each "
        f"with {format_size(streamed)} of weights in {report['sweep_weight_seconds']:.3f} s or more"
        f"\njob:       {result.makespan_seconds:.0f} s, {result.tokens_per_second:.1f} tokens/s\n"
        f"slots:     {result.slot_utilization:.1%} of {arguments.max_sequences} in use\n"
        f"KV pages:  {format_size(report['kv_bytes'])}, {result.kv_utilization:.1%} filled, "
        f"{result.preemptions} preemptions"
    )
