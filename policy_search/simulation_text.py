"""A simulation in words (no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload.tiers import format_size
from policy_search.latency import PERCENTILES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from policy_search.simulation import MachineUse, Simulation


def simulation_text(result: Simulation, *, job: str, sweeps: str, room: str) -> str:
    """`job`, `sweeps` and `room` say what ran, what a sweep is made of, and of the KV cache."""
    return "\n".join(_lines(result, job, sweeps, room))


def _lines(result: Simulation, job: str, sweeps: str, room: str) -> Iterator[str]:
    yield (
        f"{result.requests} requests ({job}), {result.prompt_tokens} prompt tokens, "
        f"{result.generated_tokens} generated"
    )
    yield f"{result.sweeps} sweeps {sweeps}"
    yield f"job:       {result.makespan_seconds:.0f} s, {result.tokens_per_second:.1f} tokens/s"
    yield f"slots:     {result.slot_utilization:.1%} in use"
    yield (
        f"KV pages:  {room}, {result.kv_utilization:.1%} filled, {result.preemptions} preemptions"
    )
    yield from _latency(result)
    for machine in result.machines:
        yield _machine(machine)
    if (network := result.network) is not None:
        yield (
            f"network:   {network.busy:.1%} busy, {format_size(network.nbytes)} in "
            f"{network.transfers} transfers"
        )


def _latency(result: Simulation) -> Iterator[str]:
    meaning = {
        "ttft": "to the first token",
        "tpot": "from token to token",
        "e2e": "to the last token",
    }
    for name, what in meaning.items():
        if values := result.latency[name]:
            points = ", ".join(f"p{at} {values[f'p{at}']:.3f}" for at in PERCENTILES)
            yield f"{name.upper() + ':':<11}{points} s {what}"
    if result.goodput is not None:
        yield (
            f"goodput:   {result.goodput:.3f} requests/s within the targets, "
            f"{result.attainment:.1%} of all"
        )


def _machine(machine: MachineUse) -> str:
    busy = ", ".join(f"{name} {share:.1%}" for name, share in machine.busy.items())
    return (
        f"{machine.name}: {machine.sweeps} sweeps, {machine.rows} rows, in a sweep "
        f"{machine.in_sweeps:.1%} of the time{' (' + busy + ')' if busy else ''}"
    )
