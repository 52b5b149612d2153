"""A run's plan in words: what lives where, and how fast that should be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compression.selection import PLAIN_BITS
from offload.tiers import format_size
from policy_search.plan_text import duration

if TYPE_CHECKING:
    from flexrun.runtime import Runtime
    from policy_search.throughput import Prediction
    from policy_search.workload import JobLengths


def placement_text(runtime: Runtime) -> str:
    """Model, weights, KV cache and sweep, a line each."""
    placed = ", ".join(
        f"{tier} {format_size(nbytes)}" for tier, nbytes in runtime.weights.placed.items() if nbytes
    )
    policy, pools = runtime.policy, runtime.pools
    tokens = {
        tier: pages * policy.page_tokens
        for tier, pages in pools.capacity.items()
        if pages and tier is not pools.swap
    }
    kv = ", ".join(f"{count} tokens on {tier}" for tier, count in tokens.items())
    return (
        f"model:   {runtime.directory.name}, {_types(runtime)}, on {runtime.backend.name}\n"
        f"weights: {placed}\n"
        f"kv:      room for {kv}\n"
        f"sweep:   up to {policy.max_rows} rows of {policy.max_sequences} sequences, in "
        f"micro-batches of {policy.micro_batch_rows}"
    )


def prediction_text(found: Prediction, job: JobLengths) -> str:
    """What the plan should do for `job`, and what bounds it."""
    return (
        f"plan:    {found.tokens_per_second:.4g} tokens/s, bound by {found.bound}; "
        f"{job.sequences} sequences of {job.prompt:.0f} + {job.output:.0f} tokens take "
        f"{duration(found.job_seconds)}"
    )


def _types(runtime: Runtime) -> str:
    stored, computed = (str(t).removeprefix("torch.") for t in (runtime.stored, runtime.dtype))
    policy, parts = runtime.policy, []
    if policy.weight_bits < PLAIN_BITS:
        parts.append(f"layers in {policy.weight_bits} bits")
    if policy.head_bits < PLAIN_BITS:
        parts.append(f"head in {policy.head_bits}")
    if policy.kv_bits < PLAIN_BITS:
        parts.append(f"KV cache in {policy.kv_bits}")
    text = stored if stored == computed else f"{stored} computed in {computed}"
    return ", ".join([text, *parts])
