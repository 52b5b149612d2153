"""A placement plan for people: what lies where, and the command that uses it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from offload.tiers import BUDGET_FLAG, Tier, format_size
from policy_search.policy import QUANTIZATION, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from policy_search.memory import TierMemory
    from policy_search.model_shape import ModelShape

BAR_WIDTH = 30


def plan_text(
    shape: ModelShape, policy: Policy, memory: Mapping[Tier, TierMemory], *, unified: bool
) -> str:
    """One line per tier, and what does not fit on the device."""
    lines = [
        f"{format_size(shape.weight_bytes)} of weights, "
        f"{format_size(shape.kv_token_bytes)} of KV cache per token",
        "",
    ]
    for tier, used in memory.items():
        if used.capacity and not (unified and tier is Tier.HOST):
            lines.append(_tier_line(tier, used, shape.kv_token_bytes))
    lines += ["bar:    W weights  K KV cache  w working memory  . free", "", _verdict(memory)]
    sequences = f"up to {policy.max_sequences} sequences"
    return "\n".join(
        [*lines, f"sweep: {policy.max_rows} rows of {sequences}, {policy.micro_batch_rows} at once"]
    )


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
    if memory[Tier.HOST].kv:
        parts.append("the KV cache on host")
    if not parts:
        return "the model fits: do not offload"
    return f"the model does not fit: {' and '.join(parts)} are read again in every sweep"


def command_line(
    model: str,
    dtype: str,
    policy: Policy,
    memory: Mapping[Tier, TierMemory],
    *,
    unified: bool,
    offload_dir: Path | None = None,
) -> str:
    """The `flexrun generate` command that runs a job under this plan."""
    command = ["flexrun", "generate", "--model", model, "--input", "prompts.jsonl"]
    command += ["--output", "results.jsonl", "--device", "cpu" if unified else "cuda"]
    if dtype != "auto":
        command += ["--dtype", dtype]
    for tier, used in memory.items():
        if tier is Tier.DEVICE or used.weights or used.kv or used.working:
            command += [BUDGET_FLAG[tier], exact_size(used.capacity)]
    if offload_dir is not None:
        command += ["--offload-dir", str(offload_dir)]
    command += ["--weights", str(policy.weights), "--kv-cache", str(policy.kv_cache)]
    command += ["--micro-batch", str(policy.micro_batch_rows), "--max-rows", str(policy.max_rows)]
    command += ["--max-sequences", str(policy.max_sequences)]
    for name in QUANTIZATION:
        if (value := getattr(policy, name)) != getattr(Policy(), name):
            command += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(command)


def exact_size(nbytes: int) -> str:
    """`nbytes` as a flag takes it, in the largest unit that loses nothing."""
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes and nbytes % 2**exponent == 0:
            return f"{nbytes >> exponent}{unit}"
    return str(nbytes)
