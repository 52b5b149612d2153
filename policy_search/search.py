"""The search for a plan: a linear program for each batch, then whole tensors and pages (no torch).

The program's shares are rounded to what the engine places, held against `memory_of`, which knows
every allocation, and priced again, with plans beside the best. The automatic policy, which knows no
speeds, is one of the candidates where it has room for the longest sequence, so that by the cost
model no plan is worse.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from offload.errors import CapacityError
from offload.tiers import Split, Tier
from policy_search.automatic import SMALLEST_DEPTH, automatic_policy
from policy_search.job_pricing import Candidate, JobPricing
from policy_search.linear_program import solve
from policy_search.memory import longest_held
from policy_search.neighbours import MICRO_BATCHES, filled, try_neighbours
from policy_search.placement_problem import off_device, placed, placement_problem
from policy_search.policy import DEFAULT_DEPTH

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from policy_search.policy import Policy

MOST_SEQUENCES = 4096
"""As many as a scheduler handles in a few milliseconds a sweep."""
FEWEST_ROWS = 16
"""That are tried where no plan with more fits."""
ENOUGH_ROOM = 0.99
_GOOD_PART = 0.05
"""Of the device's memory: a layer that takes more of it is worth a plan without."""
_NUMBERS = (2, 3, 4)
"""Of micro-batches where HOST attends, so that it and the device work at once."""
_MARGINS = (0.0, 0.02, 0.1)
"""Parts of every tier that the program leaves empty, tried in turn: whole tensors and pages take
more than their share."""
_FEWER_ROWS = (2, 4, 8, 16)
"""Parts of the rows of a sweep: what they work with has room for weights instead."""
_REFINED = (0.6, 0.75, 0.87, 1.15, 1.35, 1.6)
"""Of the best number of sequences, which was one of powers of two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search(JobPricing):
    """For the plan of a job; `base` has all of the policy that is not searched for."""

    base: Policy
    given: Collection[str] = ()
    """Fields of `base` that stay as they are."""
    around: Policy | None = None
    """Only batches of about its size are tried; None: of all sizes."""
    room_for: int | None = None
    """Tokens of a sequence that plans have room for; None: of the job's longest."""
    _found: dict[Policy, Candidate] = field(default_factory=dict, init=False)
    _too_short: set[Policy] = field(default_factory=set, init=False)
    """What fits but for the longest sequence."""

    def run(self) -> list[Candidate]:
        """All policies that were considered and fit, with room for the job's longest sequence.

        With half the rows at once, or half of these, where nothing else fits; and where nothing has
        that room, with room for half as long sequences, or half of these. Raises `CapacityError` if
        nothing fits at all.
        """
        tried, shortage = [self], self._try_all()
        while not tried[-1]._found and (fewer := tried[-1]._with_fewer_rows()) is not None:
            tried.append(fewer)
            missing = fewer._add_automatic()
            fewer._add_placed(replace(fewer.base, max_sequences=fewer.counts()[0]))
            if fewer._found:
                fewer._try_all()
            shortage = missing or shortage
        found = tried[-1]._found
        if found:
            tried[-1]._add_neighbours()
            return list(found.values())
        room_for = self.needed_tokens // 2
        if room_for and any(each._too_short for each in tried):
            return replace(self, room_for=room_for).run()
        assert shortage is not None
        raise shortage

    def _try_all(self) -> CapacityError | None:
        """Every size of a batch; what the automatic policy is short of."""
        shortage = self._add_automatic()
        if self.around is not None:
            self.add(self.around)
        for count in self.counts():
            self._add_placed(replace(self.around or self.base, max_sequences=count))
        for batch in self._refined():
            self._add_placed(batch)
        return shortage

    def _with_fewer_rows(self) -> Search | None:
        """The same search with half the rows; None where there are few, or as many as was asked
        for.
        """
        batch, most = self.base.micro_batch_rows, self.base.max_rows
        if "micro_batch_rows" not in self.given:
            batch = max(batch // 2, min(batch, FEWEST_ROWS))
        if "max_rows" not in self.given:
            most = max(most // 2, min(most, batch))
        if (batch, most) == (self.base.micro_batch_rows, self.base.max_rows):
            return None
        return replace(self, base=replace(self.base, micro_batch_rows=batch, max_rows=most))

    def _add_neighbours(self) -> None:
        """Around the fastest of all, of those with all pages on the device, and of those with all
        there: one of the latter is taken if it is not much slower.
        """
        tried = set()
        kinds = (lambda _: True, lambda p: p.pages_on_device, lambda p: p.all_on_device)
        for kind in kinds:
            best = self._fastest(kind)
            if best is None or best.policy in tried:
                continue
            tried.add(best.policy)
            if self.around is None:
                try_neighbours(self, best)
            else:
                filled(self, best.policy)

    def _fastest(self, kept: Callable[[Policy], bool] | None = None) -> Candidate | None:
        found = [each for each in self._found.values() if kept is None or kept(each.policy)]
        return max(found, key=lambda each: each.prediction.tokens_per_second, default=None)

    def counts(self) -> list[int]:
        """Of sequences that run together."""
        if "max_sequences" in self.given:
            return [self.base.max_sequences]
        most = min(MOST_SEQUENCES, self.job.sequences)
        if self.around is not None:
            here = self.around.max_sequences
            return sorted({min(most, max(1, round(f * here))) for f in (0.7, 1.0, 1.5, 2.2)})
        powers = [2**n for n in range(13) if 2**n < most]
        return [*powers, most]

    def _refined(self) -> Iterator[Policy]:
        """Around the best so far: other micro-batches and sweeps, then other counts."""
        changes: dict[str, Callable[[Policy], Iterable[int]]] = {
            "micro_batch_rows": lambda _: MICRO_BATCHES,
            "num_micro_batches": lambda best: _NUMBERS if best.kv_cache.host else (),
            "max_rows": lambda best: [max(1, best.max_rows // less) for less in _FEWER_ROWS],
            "max_sequences": lambda best: self.near(best.max_sequences),
        }
        for name, values in changes.items():
            known = name in self.given or (self.around is not None and name != "max_sequences")
            best = self._fastest()
            if best is None or known:
                continue
            for value in values(best.policy):
                changed: dict[str, Any] = {name: value}
                yield replace(best.policy, **changed)

    def near(self, count: int) -> list[int]:
        """Other numbers of sequences: somewhat fewer or more, and those with which the job is over
        after a whole number of blocks. None if it is given.
        """
        if "max_sequences" in self.given:
            return []
        jobs = self.job.sequences
        blocks = {max(1, jobs // count + more) for more in (-1, 0, 1, 2)}
        wanted = {round(factor * count) for factor in _REFINED} | {-(-jobs // n) for n in blocks}
        return sorted({min(MOST_SEQUENCES, jobs, max(1, each)) for each in wanted})

    def _add_automatic(self) -> CapacityError | None:
        kv_cache = self.base.kv_cache if "kv_cache" in self.given else None
        known = self.shape, self.limits, self.base, self.context
        if {"weights", "kv_cache"} <= set(self.given):
            return self._shortage(self.base)
        try:
            policy = automatic_policy(*known, unified=self.unified, kv_cache=kv_cache)
        except CapacityError as error:
            return error
        if "weights" in self.given:
            policy = replace(policy, weights=self.base.weights)
        return self._shortage(policy)

    def _shortage(self, policy: Policy) -> CapacityError | None:
        """What `policy` is short of; it is kept if of nothing."""
        added = self.add(policy)
        return added if isinstance(added, CapacityError) else None

    def _add_placed(self, batch: Policy) -> None:
        """Plans for one batch: all on the device, pages there, and pages anywhere."""
        batch = self.with_rows(batch)
        if not set(self.given) & {"weights", "kv_cache"}:
            here = Split(device=100)
            self.add(replace(batch, weights=here, kv_cache=here))
            if not self.unified:
                self.add(replace(batch, weights=here, kv_cache=Split(host=100)))
        if "kv_cache" in self.given:
            self._add_solved(replace(batch, kv_cache=self.base.kv_cache))
            return
        if self.around is None:
            self._add_solved(replace(batch, kv_cache=Split(device=100)))
        anywhere = Split(disk=100) if self.unified else Split(host=50, disk=50)
        found = self._add_solved(replace(batch, kv_cache=anywhere))
        if self.unified or self.around is not None:
            return
        if not found or any(each.weights.disk or each.kv_cache.disk for each in found):
            self._add_solved(replace(batch, kv_cache=Split(host=100)))

    def with_rows(self, batch: Policy) -> Policy:
        """With a row for each sequence, and some for prompts."""
        if batch.max_sequences <= batch.max_rows or "max_rows" in self.given:
            return batch
        return replace(batch, max_rows=batch.max_sequences + batch.micro_batch_rows)

    def _add_solved(self, batch: Policy) -> list[Policy]:
        """The shares that a linear program finds, with fewer layers on their way if need be."""
        found: list[Policy] = []
        depths = [batch.prefetch_depth] if batch.prefetch_depth else [DEFAULT_DEPTH, SMALLEST_DEPTH]
        for depth in depths:
            for margin in _MARGINS:
                policy = self._solved(replace(batch, prefetch_depth=depth), margin)
                if policy is None:
                    break  # more room will not be found with a larger margin
                found.append(policy)
                added = self.add(policy)
                if isinstance(added, CapacityError) and self._may_leave_device(policy.kv_cache):
                    # Few pages leave staging, beside which they live, only as much as they have.
                    added = self.add(replace(policy, kv_cache=off_device(policy.kv_cache)))
                if self.has_room(added):
                    if self._layer_matters:
                        break  # the smaller depth leaves room for what makes a difference
                    return found
        return found

    def _may_leave_device(self, pages: Split) -> bool:
        return 0 < pages.device < 100 and "kv_cache" not in self.given

    @property
    def _layer_matters(self) -> bool:
        """Whether the room of one layer more on its way is a good part of the device."""
        return self.shape.largest_layer_bytes > _GOOD_PART * self.limits[Tier.DEVICE]

    def has_room(self, found: Candidate | CapacityError) -> bool:
        """Whether it fits with pages for all sequences that it is for.

        Where tensors and buffers take more than their share, pages have what is left.
        """
        if isinstance(found, CapacityError):
            return False
        wanted = min(found.policy.max_sequences, self.job.sequences)
        return found.prediction.running >= ENOUGH_ROOM * wanted

    def _solved(self, batch: Policy, margin: float) -> Policy | None:
        """`batch` with the shares that its linear program finds. Its own pages say where there may
        be any: on DEVICE; with those on HOST; or everywhere. None where nothing fits.
        """
        problem = placement_problem(
            self.shape,
            batch,
            self.limits,
            self.job,
            self.hardware,
            unified=self.unified,
            context=self.context,
            room_for=self.needed_tokens,
            margin=margin,
        )
        if "kv_cache" in self.given or batch.kv_cache.device == 100:
            problem = replace(problem, fixed_kv=_fractions(batch.kv_cache))
        elif not batch.kv_cache.disk:
            problem = replace(problem, fixed_kv={Tier.DISK: 0.0})
        if "weights" in self.given:
            problem = replace(problem, fixed_weights=_fractions(self.base.weights))
        shares = solve(problem)
        if shares is None:
            return None
        changed: dict[str, Any] = {**placed(shares, unified=self.unified)}
        return replace(batch, **{n: each for n, each in changed.items() if n not in self.given})

    def add(self, policy: Policy) -> Candidate | CapacityError:
        """Keep `policy` if it fits, with room for the longest sequence."""
        if (found := self._found.get(policy)) is not None:
            return found
        priced = self.price(policy)
        if isinstance(priced, CapacityError):
            return priced
        if longest_held(self.shape, priced.policy, priced.memory) < self.needed_tokens:
            self._too_short.add(policy)
            return CapacityError("the KV cache is smaller than the job's longest sequence")
        self._found[policy] = priced
        return priced

    @property
    def needed_tokens(self) -> int:
        """Of one sequence, that plans have to have room for."""
        wanted = self.job.longest_sequence if self.room_for is None else self.room_for
        return min(self.context, wanted)


def _fractions(split: Split) -> dict[Tier, float]:
    return {tier: split.fraction(tier) for tier in Tier}
