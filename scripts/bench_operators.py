"""How well a model's profile predicts operators at sizes that were not measured for it.

Vidur's held-out test of its operators (MLSys 2024, section 7): sweeps of other numbers of rows,
other contexts and other lengths of prompts than the profile's are run in the same rounds as these,
and held against what the cost model makes of the profile. Beside it, the error of a profile as a
first job makes it: measured alone, before, in half a minute, so with fewer rounds, and with what
the machine has drifted since. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_links import header, markdown
from bench_policy import MODEL
from make_random_model import write_model

from flexrun.arguments import engine_config
from flexrun.engine import Engine
from flexrun.layer_run import LayerRun, Size
from flexrun.machine import open_backend
from flexrun.model import load_config
from flexrun.model_profile import Profiler, measured_profile
from flexrun.size_rounds import ATTENDING
from policy_search.hardware import Hardware
from policy_search.operators import attention_seconds, head_seconds, layer_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexrun.timed_sweep import Timed
    from policy_search.model_profile import ModelProfile
    from policy_search.model_shape import ModelShape

MOST_ERROR = 0.10
"""Target: mean of |predicted / measured - 1| of each operator."""
ROWS = (3, 6, 12, 24, 48)
PROMPTS = (3, 6, 10, 14)
"""Of 64 rows each."""
CONTEXTS = ((4, 256), (8, 256), (6, 384), (12, 384))
"""Sequences, and positions of each."""
LENGTHS = ((4, 96), (1, 256), (3, 192), (2, 384))
"""Prompts, and rows of each."""
SIZES = {
    "layers, few rows": [Size(rows, 1, generating=True) for rows in ROWS],
    "layers, many rows": [Size(count, 64) for count in PROMPTS],
    "attention of single rows": [Size(*each, generating=True) for each in CONTEXTS],
    "attention of prompts": [Size(*each) for each in LENGTHS],
}
"""By the operator that they tell of."""
HEAD = "layers, few rows"
"""In whose sweeps the head is looked at, too."""
SECONDS = 300.0
"""For the rounds of a model and what belongs to them, about."""
Pairs = dict[str, list[tuple[float, float]]]
"""Of each operator: predicted and measured seconds of every size."""


class Predicted:
    """What the cost model says of sweeps whose weights stay, as those that run here do."""

    def __init__(self, shape: ModelShape, hardware: Hardware, in_place: float) -> None:
        self._shape, self._hardware, self._in_place = shape, hardware, in_place

    def layers(self, timed: Timed) -> float:
        """All layers, with what their rows attend to."""
        shape, hardware = self._shape, self._hardware
        read = timed.read * shape.kv_token_bytes
        attending = attention_seconds(shape, hardware, timed.read, read, timed.positions)
        return layer_seconds(shape, hardware, timed.rows, 1, self._in_place) + attending

    def head(self, rows: int) -> float:
        """The head with so many rows."""
        return head_seconds(self._shape, self._hardware, rows, 1, self._in_place)


def pairs(measured: Mapping[Size, Timed], predicted: Predicted, *, head: bool) -> Pairs:
    """Predicted and measured seconds of every operator, of one kind of weights."""
    found = {
        name: [(predicted.layers(measured[size]), measured[size].seconds) for size in sizes]
        for name, sizes in SIZES.items()
    }
    if head:
        timed = [measured[size] for size in SIZES[HEAD]]
        found["head"] = [(predicted.head(each.rows), each.head) for each in timed]
    return found


def mean_error(values: list[tuple[float, float]]) -> float:
    """Of predictions, in parts of what was measured."""
    return statistics.mean(abs(seconds / timed - 1) for seconds, timed in values)


def errors(
    profiles: tuple[ModelProfile, ModelProfile], profiler: Profiler, shape: ModelShape, head: bool
) -> dict[str, Any]:
    """Of every operator, by the profile of the same rounds and by the one from before."""
    result: dict[str, Any] = {}
    for in_place, measured in enumerate(each.held_out for each in profiler.measured):
        shown = head and (not in_place or bool(profiles[0].head_in_place))
        both = []
        for profile in profiles:
            hardware = Hardware(host_to_device=float("inf")).profiled(profile)
            predicted = Predicted(shape, hardware, float(in_place))
            both.append(pairs(measured, predicted, head=shown))
        for name, values in both[0].items():
            result[name + ", in place" * in_place] = {
                "mape": mean_error(values),
                "before": mean_error(both[1][name]),
                "pairs": values,
                "pairs_before": both[1][name],
            }
    return result


def measure(model: Path, device: str, seconds: float) -> dict[str, Any]:
    """One model on one device, in the type that the engine computes in there."""
    planned = engine_config({"model": str(model), "device": device, "weights": "device=100"})
    with contextlib.closing(Engine(planned, None)) as engine:
        shape, dtype = engine._runtime.shape, engine._runtime.dtype
    print(f"measuring {model.name}", file=sys.stderr)
    config, directory = load_config(model), Path(os.environ["FLEXRUN_CACHE"])
    with contextlib.closing(open_backend(planned)) as backend:
        before = measured_profile(config, shape, dtype, backend, directory)
        with contextlib.ExitStack() as closing, torch.inference_mode():
            run = LayerRun(config, shape, dtype, backend, ATTENDING, closing)
            sizes = [size for sizes in SIZES.values() for size in sizes]
            profiler = Profiler(run, shape, seconds, sizes)
            profile = profiler.profile()
            found = errors((profile, before), profiler, shape, run.whole_head)
    return {
        "dtype": str(dtype),
        "rounds": [each.rounds for each in profiler.measured],
        "profiles": [
            {name: value for name, value in asdict(each).items() if value != math.inf}
            for each in (profile, before)
        ],
        "operators": found,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="*", default=[], help="directories, besides a random one")
    parser.add_argument("--device", default="cpu", choices=["cpu", "emulated", "cuda"])
    text = "for a model's rounds, about (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=SECONDS, help=text)
    given = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        directory = Path(name)
        os.environ["FLEXRUN_CACHE"] = str(directory / "cache")
        report = header("operators", directory.absolute())
        made = directory / "random 98M"
        made.mkdir()
        write_model(made, replace(MODEL), "bfloat16", 0)
        models = (made, *map(Path, given.models))
        report["results"] = {
            each.name: measure(each, given.device, given.seconds) for each in models
        }
    rows, most = [], 0.0
    for model, found in report["results"].items():
        for operator, each in found["operators"].items():
            errors = (f"{each[key]:.1%}" for key in ("mape", "before"))
            rows.append([f"{model}; {operator}", len(each["pairs"]), *errors])
            most = max(most, each["mape"])
    print(markdown(["model; operator", "held-out sizes", "mean error", "by a first job's"], rows))
    report["met"] = most <= MOST_ERROR
    print(f"target {MOST_ERROR:.0%} of every operator: {'met' if report['met'] else 'not met'}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
