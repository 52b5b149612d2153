"""A job on a virtual clock: the real scheduler and page pools, no model and no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from offload.pages import PagePools
    from policy_search.workload import Lengths


class Scheduler(Protocol):
    """What is simulated; `flexrun.scheduler.BatchScheduler` is the one."""

    @property
    def pools(self) -> PagePools: ...

    @property
    def running(self) -> Collection[int]: ...

    @property
    def max_sequences(self) -> int: ...

    @property
    def preemption(self) -> Any: ...

    def add(self, sequence: int, prompt_tokens: int, most_tokens: int) -> None: ...

    def next_sweep(self) -> Any: ...

    def commit(self, plan: Any) -> None: ...

    def finish(self, sequence: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Simulation:
    """What happened."""

    requests: int
    sweeps: int
    rows: int
    prompt_tokens: int
    generated_tokens: int
    makespan_seconds: float
    tokens_per_second: float
    slot_utilization: float
    """Sequences that run, over those that may; mean of all sweeps."""
    kv_utilization: float
    """Tokens stored over slots of pages held, over all sweeps."""
    preemptions: int


def simulate(
    scheduler: Scheduler,
    lengths: Sequence[Lengths],
    sweep_seconds: Callable[[int, int], float],
    *,
    max_tokens: int | None = None,
) -> Simulation:
    """Run requests of `lengths` to their ends.

    `sweep_seconds(rows, positions)` is what a sweep takes whose rows attend to `positions` keys and
    values, each row's counted. The scheduler is told no request's output length, but `max_tokens`
    for all of them; None tells it each one's own. Requests that can never fit into the KV cache
    have to be left out before.
    """
    left: dict[int, int] = {}
    for number, (prompt, output) in enumerate(lengths):
        left[number] = output
        scheduler.add(number, prompt, prompt + (max_tokens or output))
    sweeps = rows = places = stored = slots = 0
    seconds = 0.0
    pools, running = scheduler.pools, scheduler.running
    while spans := (plan := scheduler.next_sweep()).spans:
        pools.take_copies()
        sweep_rows = positions = 0
        places += len(running)
        slots += sum(count - pools.free_pages(tier) for tier, count in pools.capacity.items())
        stored += sum([table.tokens for table in pools.tables.values()])
        scheduler.commit(plan)
        for sequence, start, length, wants_logits, _ in spans:
            sweep_rows += length
            positions += length * (2 * start + length + 1) // 2
            if wants_logits:
                left[sequence] -= 1
                if not left[sequence]:
                    scheduler.finish(sequence)
                    del left[sequence]
        sweeps += 1
        rows += sweep_rows
        seconds += sweep_seconds(sweep_rows, positions)
    assert not left, "the scheduler has stopped before all requests were over"
    generated = sum(each.output for each in lengths)
    return Simulation(
        requests=len(lengths),
        sweeps=sweeps,
        rows=rows,
        prompt_tokens=sum(each.prompt for each in lengths),
        generated_tokens=generated,
        makespan_seconds=seconds,
        tokens_per_second=generated / seconds if seconds else 0.0,
        slot_utilization=places / (sweeps * scheduler.max_sequences) if sweeps else 0.0,
        kv_utilization=stored / (slots * pools.page_tokens) if slots else 0.0,
        preemptions=scheduler.preemption.count,
    )
