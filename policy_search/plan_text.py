"""A plan for people, on one screen: what lives where, how fast that is, and what bounds it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from offload.tiers import BUDGET_FLAG, Split, Tier, format_size
from policy_search.memory import default_max_rows
from policy_search.policy import QUANTIZATION, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from policy_search.advice import Advice
    from policy_search.job_pricing import Candidate
    from policy_search.memory import TierMemory
    from policy_search.planner import Plan
    from policy_search.throughput import Prediction
    from policy_search.workload import JobLengths

BAR_WIDTH = 30
_MOST_ADVICE = 4


def plan_text(plan: Plan) -> str:
    """One line per tier, the batch, the prediction, and what does not fit on the device."""
    shape, policy, memory = plan.shape, plan.policy, plan.memory
    lines = [
        f"{format_size(shape.weight_bytes)} of weights, "
        f"{format_size(shape.kv_token_bytes)} of KV cache per token",
        "",
    ]
    for tier, used in memory.items():
        if used.capacity and not (plan.search.unified and tier is Tier.HOST):
            lines.append(_tier_line(tier, used, shape.kv_token_bytes))
    lines += ["bar:    W weights  K KV cache  w working memory  . free", "", _verdict(memory)]
    lines.append(
        f"sweep:  up to {policy.max_sequences} sequences and {policy.max_rows} rows, "
        f"{policy.micro_batch_rows} in a micro-batch{_activations(policy)}"
    )
    held, wanted = plan.room_for, plan.search.needed_tokens
    if held < wanted:
        lines.append(
            f"room:   for sequences of {held:,} tokens: longer ones, of up to {wanted:,}, will fail"
        )
    return "\n".join([*lines, *_prediction_lines(plan.prediction, plan.search.job)])


def _tier_line(tier: Tier, used: TierMemory, kv_token_bytes: int) -> str:
    tokens = f" ({used.kv // kv_token_bytes:,} tokens)" if used.kv else ""
    return (
        f"{tier + ':':<8}[{_bar(used)}] weights {format_size(used.weights)}, "
        f"KV {format_size(used.kv)}{tokens}, working {format_size(used.working)}, "
        f"free {format_size(used.free)} of {format_size(used.capacity)}"
    )


def _bar(used: TierMemory) -> str:
    """Rounded at the running sums, so that the parts add up to the width."""
    bar, total = "", 0
    for letter, nbytes in (("W", used.weights), ("K", used.kv), ("w", used.working)):
        total += nbytes
        bar = bar.ljust(round(BAR_WIDTH * total / used.capacity), letter)
    return bar.ljust(BAR_WIDTH, ".")


def _verdict(memory: Mapping[Tier, TierMemory]) -> str:
    parts = [
        f"{format_size(memory[tier].weights)} of weights on {tier}"
        for tier in (Tier.HOST, Tier.DISK)
        if memory[tier].weights
    ]
    parts += [f"KV cache on {tier}" for tier in (Tier.HOST, Tier.DISK) if memory[tier].kv]
    if not parts:
        return "the model fits: do not offload"
    if not memory[Tier.HOST].weights and not memory[Tier.DISK].weights:
        return f"the weights fit; of so many sequences there is {' and '.join(parts)}"
    return f"the model does not fit: {' and '.join(parts)} are read again in every sweep"


def _activations(policy: Policy) -> str:
    parked = policy.activations.host
    return f"; {parked:g} % of the hidden states wait on host" if parked else ""


def _prediction_lines(found: Prediction, job: JobLengths) -> list[str]:
    prompts = found.running * job.prompt
    prefill = prompts / found.prefill_seconds if found.prefill_seconds else 0.0
    decode = job.sequences * job.output / found.decode_seconds if found.decode_seconds else 0.0
    longest = found.busy[found.bound] or 1.0
    others = sorted(found.busy.items(), key=lambda each: -each[1])
    shares = [
        f"{name} {seconds / longest:.0%}"
        for name, seconds in others
        if name != found.bound and seconds >= 0.005 * longest
    ]
    beside = f"; beside it {', '.join(shares)} of its time" if shares else ""
    return [
        f"job:    {job.sequences} sequences of {job.prompt:.0f} + {job.output:.0f} tokens, "
        f"{found.running:.0f} at once: {duration(found.job_seconds)}, the first are over after "
        f"{duration(found.request_seconds)}",
        f"speed:  {found.tokens_per_second:.4g} tokens/s: prefill {prefill:.4g} for "
        f"{duration(found.prefill_seconds)}, then {decode:.4g} with a sweep every "
        f"{duration(found.sweep_seconds)}",
        f"bound:  {found.bound}{beside}",
    ]


def advice_line(advice: Sequence[Advice]) -> str:
    """What would help most."""
    if not advice:
        return "faster: no single change of the machine adds 5 %"
    best = (f"{each.change} ({each.factor:.2g}x)" for each in advice[:_MOST_ADVICE])
    return f"faster: with {'; '.join(best)}"


def comparison(plans: Mapping[str, Candidate | None]) -> str:
    """A table of plans by name; None: it does not fit."""
    lines = []
    for name, plan in plans.items():
        if plan is None:
            lines.append(f"  {name:<28} does not fit")
            continue
        found = plan.prediction
        lines.append(
            f"  {name:<28} {found.tokens_per_second:>9.4g} tokens/s, "
            f"{found.running:>5.0f} at once, bound by {found.bound}"
        )
    return "\n".join(["compared:", *lines])


def duration(seconds: float) -> str:
    """For a person: `35 ms`, `4.2 s`, `12 min`, `3.4 h`."""
    for unit, most, size in (("ms", 1, 1e-3), ("s", 180, 1), ("min", 7200, 60)):
        if seconds < most:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def command_line(
    model: str,
    dtype: str,
    plan: Plan,
    *,
    device: str,
    offload_dir: Path | None = None,
) -> str:
    """The `flexrun generate` command that runs a job under this plan."""
    policy, memory = plan.policy, plan.memory
    command = ["flexrun", "generate", "--model", model, "--input", "prompts.jsonl"]
    command += ["--output", "results.jsonl", "--device", device]
    if dtype != "auto":
        command += ["--dtype", dtype]
    for tier, used in memory.items():
        if tier is Tier.DEVICE or used.weights or used.kv or used.working:
            command += [BUDGET_FLAG[tier], exact_size(used.capacity)]
    if offload_dir is not None:
        command += ["--offload-dir", str(offload_dir)]
    command += ["--weights", str(policy.weights), "--kv-cache", str(policy.kv_cache)]
    if policy.activations != Split(device=100):
        command += ["--activations", str(policy.activations)]
    command += ["--micro-batch", str(policy.micro_batch_rows)]
    if policy.num_micro_batches is not None:
        command += ["--num-micro-batches", str(policy.num_micro_batches)]
    if _says_max_rows(plan):
        command += ["--max-rows", str(policy.max_rows)]
    command += ["--max-sequences", str(policy.max_sequences)]
    for name in QUANTIZATION:
        if (value := getattr(policy, name)) != getattr(Policy(), name):
            command += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(command)


def _says_max_rows(plan: Plan) -> bool:
    """What is not said leaves the engine free to keep to the rows that cost nothing."""
    own = default_max_rows(plan.shape, plan.search.limits[Tier.DEVICE])
    enlarged = Policy(max_rows=own).with_batch(micro_batch_rows=plan.policy.micro_batch_rows)
    return "max_rows" in plan.search.given or plan.policy.max_rows != enlarged.max_rows


def exact_size(nbytes: int) -> str:
    """`nbytes` as a flag takes it, in the largest unit that loses nothing."""
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes and nbytes % 2**exponent == 0:
            return f"{nbytes >> exponent}{unit}"
    return str(nbytes)
