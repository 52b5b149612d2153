"""What storing fewer bits costs: perplexity of a public-domain text, in one table.

Two models: a Llama trained from scratch in float32 (`train_reference.py`), which judges how weights
are rounded, and the demo's 135M model, whose published weights were in 4 bits already, so that it
judges the KV cache and the whole. All rows compute in float32 over the same windows of the held-out
chapters (`get_text.py`).

A rounded model is better or worse by luck, too: by as much as methods differ. So methods are
compared over several groupings, which begin at another column: rounding between the ends of a
group's range (FlexGen's), ours, and HQQ if it is installed, each given to the engine as a
checkpoint of what its codes stand for, with scales of 16 bits. The last line on stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_links import header, markdown
from get_text import texts
from safetensors.torch import load_file, save_file
from train_reference import Recipe, trained

from compression import groupwise
from compression.expansion import quantize
from compression.spec import GroupFormat
from flexrun.arguments import engine_config
from flexrun.perplexity import Evaluation, evaluate
from flexrun.tokenizer import Tokenizer

SCRIPTS = Path(__file__).parent
MINMAX, OURS, HQQ = "min/max", "ours", "HQQ"
MOST_OF_MINMAX, MOST_OVER_HQQ = 0.75, 1.02
"""Targets, on the trained model: of the increase by min/max rounding, and of HQQ's perplexity."""
Rounding = Callable[[torch.Tensor, GroupFormat], torch.Tensor]
"""Values [rows, columns] to those that their codes stand for."""


def by_minmax(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """Between the ends of each group's range, FlexGen's method."""
    packed = groupwise.quantize_minmax(values, spec)
    return groupwise.expand(packed, spec, values.shape[1], torch.float32)


def by_search(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """Ours."""
    return groupwise.expand(quantize(values, spec), spec, values.shape[1], torch.float32)


def by_hqq(values: torch.Tensor, spec: GroupFormat) -> torch.Tensor:
    """Half-quadratic quantization with the library's own settings; scale and zero in 16 bits."""
    from hqq.core.quantize import Quantizer

    options: dict[str, Any] = {"nbits": spec.bits, "group_size": spec.group, "axis": 1}
    codes, meta = Quantizer.quantize(values, **options, device="cpu", compute_dtype=torch.float32)
    meta["compute_dtype"] = torch.float32
    for name in ("scale", "zero"):
        meta[name] = meta[name].half().float()
    return Quantizer.dequantize(codes, meta).float()


def rounded_copy(
    source: Path, target: Path, rounding: Rounding, spec: GroupFormat, shift: int
) -> Path:
    """The checkpoint with the matrices of its layers rounded, in groups from column `shift` on."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
            continue
        tensors = load_file(path)
        for name, values in tensors.items():
            if ".layers." in name and values.dim() == 2:
                found = rounding(values.float().roll(-shift, 1).contiguous(), spec)
                tensors[name] = found.roll(shift, 1).contiguous()
            else:
                tensors[name] = values.float()
        save_file(tensors, target / path.name, {"format": "pt"})
    return target


def measure(model: Path, given: argparse.Namespace, **settings: Any) -> Evaluation:
    """Perplexity of the held-out text."""
    text = texts()[1].read_text(encoding="utf-8")
    tokens = Tokenizer.load(model).encode(text)[: given.text_tokens]
    values = {"model": str(model), "device": "cpu", "dtype": "float32", **settings}
    return evaluate(engine_config(values), tokens, given.context, given.context // 2, given.chunk)


def increases(model: Path, base: float, given: argparse.Namespace) -> dict[str, list[float]]:
    """Relative increase of perplexity by each way to round layers, for each grouping."""
    spec = GroupFormat(4, given.group_size)
    roundings: dict[str, Rounding] = {MINMAX: by_minmax, OURS: by_search}
    if importlib.util.find_spec("hqq") is not None:
        roundings[HQQ] = by_hqq
    found: dict[str, list[float]] = {name: [] for name in roundings}
    for number in range(given.groupings):
        shift = number * given.group_size // given.groupings
        for name, rounding in roundings.items():
            with tempfile.TemporaryDirectory() as directory:
                copy = rounded_copy(model, Path(directory, "model"), rounding, spec, shift)
                found[name].append(measure(copy, given).perplexity / base - 1)
    return found


def table(model: Path, given: argparse.Namespace) -> dict[str, Evaluation]:
    """All ways in which the engine stores a model, by name."""
    group = {"group_size": given.group_size}
    rows = {"as stored": measure(model, given)}
    with tempfile.TemporaryDirectory() as directory:
        offload = {"offload_dir": directory}
        rows["4 bits"] = measure(model, given, weight_bits=4, **group, **offload)
        rows["4 bits, head 8"] = measure(
            model, given, weight_bits=4, head_bits=8, **group, **offload
        )
        rows["8 bits"] = measure(model, given, weight_bits=8, **group, **offload)
        rows["KV cache 4 bits"] = measure(model, given, kv_bits=4, **group)
        rows["4 bits, KV cache 4"] = measure(
            model, given, weight_bits=4, kv_bits=4, **group, **offload
        )
    return rows


def show(rows: dict[str, Evaluation]) -> str:
    """One model's table."""
    base = rows["as stored"]
    lines = []
    for name, found in rows.items():
        same = sum(base.greedy[at] == token for at, token in found.greedy.items())
        lines.append([
            name,
            f"{found.perplexity:.4f}",
            f"{found.perplexity / base.perplexity - 1:+.2%}",
            f"{same / found.scored:.1%}",
        ])  # fmt: skip
    return markdown(["stored", "perplexity", "increase", "same next token"], lines)


def verdict(found: dict[str, list[float]]) -> dict[str, Any]:
    """The trained model's figures, means over the groupings, against the targets."""
    means = {name: statistics.mean(each) for name, each in found.items()}
    share = means[OURS] / means[MINMAX]
    result: dict[str, Any] = {"share_of_minmax": share, "met": share <= MOST_OF_MINMAX}
    if HQQ in means:
        result["over_hqq"] = (1 + means[OURS]) / (1 + means[HQQ])
        result["met"] &= result["over_hqq"] <= MOST_OVER_HQQ
    return result


def show_increases(found: dict[str, list[float]]) -> str:
    """The methods' table."""
    lines = [
        [name, f"{statistics.mean(each):+.3%}", f"{statistics.pstdev(each):.3%}",
         " ".join(f"{one:+.3%}" for one in each)]
        for name, each in found.items()
    ]  # fmt: skip
    return markdown(["4 bits, layers", "increase, mean", "deviation", "of each grouping"], lines)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--text-tokens", type=int, default=65536, help="of the held-out text (%(default)s)")
    add("--context", type=int, default=256, help="tokens of a window (%(default)s)")
    text = "rows of a window computed together: later ones see packed pages (%(default)s)"
    add("--chunk", type=int, default=32, help=text)
    add("--group-size", type=int, default=64)
    add("--groupings", type=int, default=6, help="that methods are compared over (%(default)s)")
    add("--models", nargs="+", default=["trained", "demo"], choices=["trained", "demo"])
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    given = read_arguments()
    report: dict[str, Any] = header("quality", Path())
    for which in given.models:
        if which == "trained":
            model = trained(Recipe())
        else:
            command = [sys.executable, str(SCRIPTS / "get_demo_model.py")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            model = Path(done.stdout.strip().split("\n")[-1])
        rows = table(model, given)
        print(f"\n{model.name}, {rows['as stored'].scored} tokens\n\n{show(rows)}")
        report[which] = {name: found.perplexity for name, found in rows.items()}
        if which == "trained":
            found = increases(model, rows["as stored"].perplexity, given)
            report |= {"increases": found} | (judged := verdict(found))
            print(f"\n{show_increases(found)}\n")
            print(
                f"ours over min/max rounding: {judged['share_of_minmax']:.2f} of the increase "
                f"(target {MOST_OF_MINMAX})"
            )
            if "over_hqq" in judged:
                print(f"HQQ's perplexity x {judged['over_hqq']:.4f} (target {MOST_OVER_HQQ})")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
