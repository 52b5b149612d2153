"""A machine on the virtual clock: the real scheduler and page pools, no model and no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from policy_search.sweep_load import SweepLoad

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from offload.pages import PagePools
    from policy_search.sweep_load import SweepTerms


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

    def add(
        self,
        sequence: int,
        prompt_tokens: int,
        most_tokens: int,
        group: int | None = None,
        computed: int = 0,
    ) -> None: ...

    def next_sweep(self) -> Any: ...

    def commit(self, plan: Any) -> None: ...

    def finish(self, sequence: int) -> None: ...


class Sweep(NamedTuple):
    """One that has been started."""

    start: float
    """Seconds, on the virtual clock."""
    load: SweepLoad
    terms: SweepTerms
    begun: list[int]
    """Sequences that have their first rows on this machine."""
    first: list[int]
    """Those that get their first token from this machine, …"""
    last: list[int]
    """… and those that get their last one."""

    @property
    def end(self) -> float:
        return self.start + self.terms.seconds


class SimulatedMachine:
    """One scheduler, its pages, and the sweep that is under way."""

    def __init__(
        self,
        number: int,
        scheduler: Scheduler,
        cost: Callable[[SweepLoad], SweepTerms],
        name: str = "machine 0",
    ) -> None:
        self.number = number
        """Its place in its cluster."""
        self.name = name
        self.scheduler = scheduler
        self.cost = cost
        self.pending_tokens = 0
        """See `Cluster`, which counts them."""
        self.woken = False
        """A sweep is under way, or about to start."""
        self.sweeps = self.rows = 0
        self.seconds = 0.0
        """In sweeps."""
        self.busy: dict[str, float] = {}
        """Seconds of every resource."""
        self.places = self.slots = self.stored = 0
        """Sums over all sweeps: of running sequences, of token slots in their pages, and of tokens
        in these."""
        self._left: dict[int, int] = {}
        """Tokens that each sequence still gets here; negative while it got none yet."""
        self._sweep: tuple[Any, Sweep] | None = None

    def add(self, sequence: int, prompt: int, most: int, output: int, computed: int = 0) -> None:
        """Queue a sequence of `prompt` tokens that gets `output` more here, `most` in all as far as
        the scheduler knows. Its first `computed` positions come from another machine.
        """
        self._left[sequence] = -output
        self.scheduler.add(sequence, prompt, most, computed=computed)

    def start_sweep(self, now: float) -> Sweep | None:
        """Plan and price a sweep; None if there is nothing to compute."""
        assert self._sweep is None
        scheduler = self.scheduler
        plan = scheduler.next_sweep()
        if not (spans := plan.spans):
            return None
        pools = scheduler.pools
        pools.take_copies()
        self.places += len(scheduler.running)
        free = sum([pools.free_pages(tier) for tier in pools.capacity])
        self.slots += (sum(pools.capacity.values()) - free) * pools.page_tokens
        self.stored += sum([table.tokens for table in pools.tables.values()])
        sweep = self._priced(now, spans)
        self._sweep = plan, sweep
        return sweep

    def _priced(self, now: float, spans: list[Any]) -> Sweep:
        """What rides in a sweep, what that takes, and whom it gives a first or last token.

        The last row of a prompt gives logits, too, but is counted with its prompt.
        """
        left = self._left
        begun: list[int] = []
        first: list[int] = []
        last: list[int] = []
        prompt_rows = generating = read = positions = stored = 0
        for sequence, start, length, wants_logits, _ in spans:  # thousands in every sweep
            if length == 1 and wants_logits:
                generating += 1
                read += start + 1
            else:
                end = start + length
                prompt_rows += length
                stored += start
                positions += length * (start + end + 1) // 2
                if not start:
                    begun.append(sequence)
                if not wants_logits:
                    continue
            tokens = left[sequence]
            if tokens < 0:
                first.append(sequence)
                tokens = -tokens
            left[sequence] = tokens - 1
            if tokens == 1:
                last.append(sequence)
        load = SweepLoad(prompt_rows + generating, generating, read, read + positions, stored)
        return Sweep(now, load, self.cost(load), begun, first, last)

    def end_sweep(self) -> Sweep:
        """What was computed is there; sequences with their last token give their pages back."""
        assert self._sweep is not None
        (plan, sweep), self._sweep = self._sweep, None
        self.scheduler.commit(plan)
        for sequence in sweep.last:
            self.scheduler.finish(sequence)
            del self._left[sequence]
        self.sweeps += 1
        self.rows += int(sweep.load.rows)
        self.seconds += sweep.terms.seconds
        for resource, seconds in sweep.terms.busy.items():
            self.busy[resource] = self.busy.get(resource, 0.0) + seconds
        return sweep

    @property
    def idle(self) -> bool:
        """Nothing is left to do."""
        return not self._left
