"""A plan as an image: what latency buys in throughput, and the roofs that a sweep's rows meet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from policy_search.errors import PolicyError
from policy_search.sweep_cost import SweepCost
from policy_search.sweep_load import SweepLoad

if TYPE_CHECKING:
    from pathlib import Path

    from policy_search.job_pricing import Candidate
    from policy_search.machine_spec import MachineSpec
    from policy_search.planner import Plan

_POINTS = 60


def plot_plan(plan: Plan, machine: MachineSpec, path: Path) -> None:
    """Write the image; its type is that of the name. Raises `PolicyError`."""
    try:
        from matplotlib.figure import Figure  # no window is ever opened
    except ImportError:
        raise PolicyError(
            "--plot needs matplotlib", hint="install it: pip install 'flexrun[plot]'"
        ) from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _frontier(left, plan)
    _roofline(right, plan)
    figure.suptitle(f"{machine.name}: {plan.prediction.tokens_per_second:.4g} tokens/s")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"cannot write {path}: {error}", hint="give a name that ends in .png, .svg or .pdf"
        ) from None


def frontier(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other one beats in both, from the lowest latency on."""
    best: list[Candidate] = []
    for each in sorted(candidates, key=lambda one: one.prediction.request_seconds):
        rate = each.prediction.tokens_per_second
        if not best or rate > best[-1].prediction.tokens_per_second:
            best.append(each)
    return best


def roofs(plan: Plan) -> dict[str, list[tuple[float, float]]]:
    """For each resource that works: sequences that generate, and their tokens per second if it were
    the only one.
    """
    search, policy = plan.search, plan.policy
    known = search.shape, policy, plan.memory, search.hardware
    cost = SweepCost(*known, unified=search.unified)
    context = search.job.prompt + search.job.output / 2
    most = max(2.0, 4 * plan.prediction.running)
    found: dict[str, list[tuple[float, float]]] = {}
    for step in range(_POINTS):
        running = math.exp(math.log(most) * step / (_POINTS - 1))
        read = running * context
        terms = cost.terms(SweepLoad(running, running, read, read, 0.0))
        for name, seconds in terms.busy.items():
            if seconds:
                found.setdefault(name, []).append((running, running / seconds))
    return found


def _frontier(axes: Any, plan: Plan) -> None:
    points = [each.prediction for each in plan.candidates]
    seconds = [each.request_seconds for each in points]
    axes.scatter(seconds, [each.tokens_per_second for each in points], s=12, alpha=0.4)
    best = [each.prediction for each in frontier(plan.candidates)]
    axes.plot(
        [each.request_seconds for each in best], [each.tokens_per_second for each in best], "-o"
    )
    chosen = plan.prediction
    axes.scatter([chosen.request_seconds], [chosen.tokens_per_second], marker="*", s=160)
    axes.set(xscale="log", yscale="log", xlabel="seconds of a request", ylabel="tokens/s")
    axes.set_title("throughput over latency (star: this plan)")


def _roofline(axes: Any, plan: Plan) -> None:
    for name, points in roofs(plan).items():
        axes.plot(*zip(*points), label=name)
    axes.axvline(plan.prediction.running, color="gray", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="sequences that generate", ylabel="tokens/s")
    axes.set_title("roofs of each resource (dotted: this plan)")
    axes.legend(fontsize=8)
