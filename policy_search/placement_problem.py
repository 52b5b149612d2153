"""The linear program of one batch: what it needs of the model, in bytes and seconds (no torch)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from offload.tiers import BROKEN_OFF, STAGING_BUFFERS, Split, Tier, staging_buffer_bytes
from policy_search.kv_memory import (
    embedding_rows,
    hosted_row_bytes,
    kv_working,
    staged_tiers,
)
from policy_search.linear_program import PhaseBytes, Problem
from policy_search.memory import IN_MOTION, workspace
from policy_search.operators import (
    attention_seconds,
    expansion_seconds,
    head_seconds,
    layer_seconds,
    program_seconds,
)
from policy_search.sweep_cost import disk_page_seconds, micro_batches
from policy_search.throughput import held_tokens, job_phases

if TYPE_CHECKING:
    from collections.abc import Mapping

    from policy_search.hardware import Hardware
    from policy_search.linear_program import Shares
    from policy_search.model_shape import ModelShape
    from policy_search.policy import Policy
    from policy_search.throughput import Phase
    from policy_search.workload import JobLengths

SHARE_FOR_STAGING = 0.05
"""Of DEVICE, for buffers of pages on their way, also where no sequence needs as much: a micro-batch
has to fit into one, too.
"""


def placement_problem(
    shape: ModelShape,
    policy: Policy,
    limits: Mapping[Tier, int],
    job: JobLengths,
    hardware: Hardware,
    *,
    unified: bool,
    context: int,
    room_for: int,
    margin: float,
) -> Problem:
    """With weights that are streamed, under the batch of `policy`, whose splits say only on which
    tiers there may be pages. There is room for one sequence of `room_for` tokens, also in staging.
    A part of every tier, the `margin`, stays empty.
    """
    phases = job_phases(policy, math.inf, job)
    placeable = shape.weight_bytes - shape.resident_bytes
    tables = sum(tensor.nbytes for tensor in shape.tensors if tensor.unit < 0)
    held = held_tokens(policy, job)
    rows = policy.max_rows * shape.hidden_size * shape.value_bytes
    moving = (IN_MOTION + BROKEN_OFF) * rows * policy.micro_batch_rows / policy.max_rows
    fixed = _fixed(shape, policy, unified=unified)
    free = limits[Tier.DEVICE] - fixed[Tier.DEVICE]
    wanted = SHARE_FOR_STAGING * limits[Tier.DEVICE]
    staging = _staging_pages(shape, policy, min(context, room_for), wanted, free, unified)
    staging = min(staging, -(-context // policy.page_tokens))
    for tier, nbytes in kv_working(shape, policy, staging, unified).items():
        fixed[tier] += nbytes
    room = {tier: limits[tier] * (1 - margin) - fixed[tier] for tier in Tier}
    if not shape.always_prepared:
        room[Tier.DISK] = max(0.0, room[Tier.DISK])  # where nothing is there, nothing is needed
    return Problem(
        phases=tuple(
            _bytes(shape, phase, policy, hardware) for phase in (phases.filling, phases.generating)
        ),
        weights=placeable,
        streamed=placeable - tables,
        kv=max(phases.running * held, room_for) * shape.kv_token_bytes,
        on_disk=0 if not shape.prepared_bytes or shape.always_prepared else placeable,
        hidden=0 if unified else max(0.0, rows - moving),
        page_seconds=disk_page_seconds(shape, policy),
        room=room,
        hardware=hardware,
        unified=unified,
        attention=policy.attention,
    )


def _bytes(shape: ModelShape, phase: Phase, policy: Policy, hardware: Hardware) -> PhaseBytes:
    load, kv = phase.load, shape.kv_token_bytes
    batches = micro_batches(policy, load.rows)
    prompts = attention_seconds(shape, hardware, 0.0, 0.0, load.positions - load.read)
    layers = layer_seconds(shape, hardware, load.rows, batches)
    head = head_seconds(shape, hardware, load.generating, batches)
    sent, back = (hosted_row_bytes(shape)[tier] for tier in (Tier.HOST, Tier.DEVICE))
    hosted = load.generating * shape.num_layers
    return PhaseBytes(
        sweeps=phase.sweeps,
        compute=expansion_seconds(shape, hardware) + layers + prompts,
        around=head + program_seconds(hardware, batches),
        read=load.read * kv,
        stored=load.stored * kv,
        new=load.rows * kv,
        hidden=load.rows * shape.hidden_size * shape.value_bytes * shape.num_layers,
        sent=hosted * (sent - back),
        results=hosted * back,
    )


def _staging_pages(
    shape: ModelShape, policy: Policy, room_for: int, wanted: float, free: float, unified: bool
) -> int:
    """Of one buffer: for a sequence of `room_for` tokens, and as many as the `wanted` bytes of all
    buffers on DEVICE are; no more than what is `free` there.
    """
    staged = staged_tiers(policy, unified)
    if not staged:
        return 0
    page_bytes = 2 * staged * max(shape.kv_bytes_per_token) * policy.page_tokens
    free -= kv_working(shape, policy, 0, unified)[Tier.DEVICE]
    needed = -(-room_for // (policy.page_tokens * staged))
    return max(1, min(max(needed, int(wanted // page_bytes)), int(free // page_bytes)))


def _fixed(shape: ModelShape, policy: Policy, *, unified: bool) -> dict[Tier, float]:
    """Bytes of every tier that are needed whatever the shares, but for what pages need."""
    ring = shape.working_bytes(policy.depth) + shape.expanded_bytes
    fixed: dict[Tier, float] = dict.fromkeys(Tier, 0.0)
    waiting = replace(policy, activations=Split(device=100))
    fixed[Tier.DEVICE] = workspace(shape, waiting) + ring + shape.resident_bytes
    if not unified:
        buffer = staging_buffer_bytes(max(shape.largest_layer_bytes, shape.head_bytes))
        fixed[Tier.HOST] += STAGING_BUFFERS * buffer + embedding_rows(shape, policy, unified)
    if shape.always_prepared:
        fixed[Tier.DISK] += shape.prepared_bytes
    else:
        fixed[Tier.DISK] += max(0, shape.prepared_bytes - shape.weight_bytes)
    return fixed


def off_device(split: Split) -> Split:
    """With what is on DEVICE on the fastest of the other tiers that is used."""
    if split.host:
        return Split(host=round(split.host + split.device, 2), disk=split.disk)
    return Split(disk=100)


def placed(shares: Shares, *, unified: bool) -> dict[str, Split]:
    """The fields of a policy that `shares` are, in whole parts."""
    fields = {"weights": _split(shares.weights), "kv_cache": _split(shares.kv)}
    if not unified:
        parked = math.floor(100 * shares.hidden_on_host)
        fields["activations"] = Split(device=100 - parked, host=parked)
    return fields


def _split(shares: Mapping[Tier, float]) -> Split:
    """In percent with two digits; rounding never makes a fast tier fuller, nor uses one that the
    program does not.
    """
    percent = {tier: math.floor(1e4 * share + 1e-6) / 100 for tier, share in shares.items()}
    rest = round(100 - sum(percent.values()), 2)
    last = max((tier for tier in Tier if shares[tier] > 1e-6), key=list(Tier).index)
    percent[last] = round(percent[last] + rest, 2)
    return Split(**{tier.value: part for tier, part in percent.items()})
