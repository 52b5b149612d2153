"""Facts about the rows that are free."""

from __future__ import annotations

import pytest
import torch

from compression.spec import GroupFormat
from flexrun.calibration import RowBudget, measured_expansion, measured_flops
from flexrun.schedulers import ContinuousScheduler
from offload.backend_cpu import CpuBackend
from offload.pages import PagePools
from offload.slabs import Weight
from offload.tiers import MemoryAccount, Tier


def make_scheduler() -> ContinuousScheduler:
    pools = PagePools({Tier.DEVICE: 100}, 4)
    return ContinuousScheduler(pools, max_rows=500, max_sequences=8, micro_batch_rows=64)


def link(sweeps: int) -> tuple[list[float], list[float]]:
    """Busy for a second in each sweep, as it would be by itself."""
    return [float(sweeps)], [float(sweeps)]


def test_rows_that_take_longer_than_planned_are_fewer():
    """Weights take a second, a row 10 ms and not 5: after some sweeps a hundred rows are free."""
    scheduler, total = make_scheduler(), 0.0
    budget = RowBudget(scheduler, 1.0, 200, prompts=True, guess=True)
    assert (scheduler.free_rows, scheduler.speculation.most_rows) == (200, 200)
    for sweep in range(20):
        total += budget.rows * 0.01
        budget.learn(budget.rows, total, *link(sweep + 1))
    assert budget.rows == pytest.approx(100, abs=1)
    assert (scheduler.free_rows, scheduler.speculation.most_rows) == (budget.rows, budget.rows)


def test_weights_that_take_longer_than_planned_leave_more_rows_free():
    """The slower of two links takes three seconds and not one: three times as many rows are free.

    Half of that time it is slowed down by compute: guesses would slow it down more.
    """
    scheduler, computed = make_scheduler(), 0.0
    budget = RowBudget(scheduler, 1.0, 100, prompts=True, guess=True)
    for sweep in range(1, 12):
        computed += budget.rows * 0.01
        budget.learn(budget.rows, computed, [0.3 * sweep, 3.0 * sweep], [0.3 * sweep, 1.5 * sweep])
    assert scheduler.free_rows == budget.rows == pytest.approx(300, abs=1)
    assert scheduler.speculation.most_rows == pytest.approx(150, abs=1)


def test_what_expands_weights_is_the_same_in_every_sweep():
    """A row takes 10 ms, expansion 0.4 s of the second that weights take: sixty rows are free."""
    scheduler, computed = make_scheduler(), 0.0
    budget = RowBudget(scheduler, 1.0, 20, prompts=True, guess=True, expansion=0.4)
    for sweep in range(1, 12):
        computed += 0.4 + budget.rows * 0.01
        budget.learn(budget.rows, computed, *link(sweep))
    assert scheduler.free_rows == budget.rows == pytest.approx(60, abs=1)


def test_sweeps_without_prompts_are_full_when_guesses_fill_them():
    """Weights take three times as long beside compute: sweeps never have half of these rows."""
    scheduler, computed = make_scheduler(), 0.0
    budget = RowBudget(scheduler, 1.0, 100, prompts=False, guess=True)
    for sweep in range(1, 30):
        rows = scheduler.speculation.most_rows
        computed += rows * (0.01 if sweep < 10 else 0.02)
        budget.learn(rows, computed, [3.0 * sweep], [1.0 * sweep])
    assert scheduler.speculation.most_rows == pytest.approx(50, abs=1)


def test_small_sweeps_say_nothing_about_full_ones():
    """A few rows take nearly as long as many: what they take each is not what many would."""
    scheduler = make_scheduler()
    budget = RowBudget(scheduler, 1.0, 200, prompts=True, guess=False)
    for sweep in range(20):
        budget.learn(4, (sweep + 1) * 0.5, *link(sweep + 1))
    assert budget.rows == 200
    assert scheduler.speculation.most_rows == 0


def test_sweeps_without_expansion_say_nothing_about_others():
    """Their rows were multiplied with packed weights: what they took is not what others would."""
    scheduler = make_scheduler()
    budget = RowBudget(scheduler, 1.0, 20, prompts=True, guess=True, expansion=0.4)
    for sweep in range(1, 12):
        budget.learn(20, sweep * 0.5, *link(sweep), expanded=0.3)
    assert scheduler.free_rows == budget.rows == 20


def test_a_head_that_was_not_expanded_is_no_reason_not_to_learn():
    """Of half a second a quarter less: sixty rows are free."""
    scheduler, computed = make_scheduler(), 0.0
    budget = RowBudget(scheduler, 1.0, 20, prompts=True, guess=True, expansion=0.4)
    for sweep in range(1, 12):
        computed += 0.3 + budget.rows * 0.01
        budget.learn(budget.rows, computed, *link(sweep), expanded=0.75)
    assert scheduler.free_rows == budget.rows == pytest.approx(60, abs=1)


def test_one_slow_sweep_changes_little():
    """The first sweep compiles kernels: it takes a hundred times as long."""
    scheduler, total = make_scheduler(), 100.0
    budget = RowBudget(scheduler, 1.0, 100, prompts=False, guess=True)
    budget.learn(100, total, *link(1))
    for sweep in range(1, 11):
        total += budget.rows * 0.01
        budget.learn(budget.rows, total, *link(sweep + 1))
    assert budget.rows == pytest.approx(100, abs=1)
    assert scheduler.free_rows is None


def test_a_plan_beyond_what_a_sweep_may_have_is_corrected():
    """Planned for thousands of rows, sweeps of the most they may have tell better."""
    scheduler, total = make_scheduler(), 0.0
    budget = RowBudget(scheduler, 1.0, 5000, prompts=True, guess=True)
    for sweep in range(9):
        total += scheduler.max_rows * 0.01
        budget.learn(scheduler.max_rows, total, *link(sweep + 1))
    assert budget.rows == pytest.approx(100, abs=1)


@pytest.mark.parametrize("limit", [1 << 20, 8 << 20, None])
def test_measuring_products_keeps_within_the_budget(monkeypatch, limit):
    """Matrices, rows and products fit into what is left on the device and what sweeps leave."""
    made, workspace = [], 2 << 20
    linear = torch.nn.functional.linear

    def counted(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        product = linear(rows, matrix)
        made.append(sum(each.nbytes for each in (rows, matrix, product)))
        return product

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    backend = CpuBackend(MemoryAccount({} if limit is None else {Tier.DEVICE: limit}))
    assert measured_flops(backend, torch.float32, 1024, 4096, workspace) > 0
    most = 64 << 20 if limit is None else limit + workspace
    assert most // 4 < max(made) <= most


@pytest.mark.parametrize("limit", [None, 100_000])
@pytest.mark.parametrize("spec", [GroupFormat(4, 64), None])
def test_measuring_expansion_keeps_within_the_budget(spec, limit):
    """Some rows of a weight, in groups or of another type, as many as fit."""
    backend = CpuBackend(MemoryAccount(limits={} if limit is None else {Tier.DEVICE: limit}))
    weight = Weight("w", torch.Size([4096, 256]), torch.bfloat16, (), torch.float32, spec=spec)
    rows = []

    def fill(self: Weight, out: torch.Tensor, data: torch.Tensor) -> None:
        rows.append(len(out))
        assert out.nbytes + data.nbytes <= (limit or 1 << 30)
        assert data.nbytes * 4096 == weight.nbytes * len(out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weight, "fill", fill)
        assert measured_expansion(backend, weight, 0) > 0
    assert len(set(rows)) == 1
    assert (rows[0] == 4096) == (limit is None)
    assert measured_expansion(backend, weight, 0) > 0
    backend.close()
