"""What guessed tokens cost where they are wrong, and save where they are right.

On the emulated device, whose link has a stated speed, a random Llama with few tokens completes a
job with and without guesses in turn. Drawn at random, its tokens often repeat pairs of earlier ones
and go on differently: most guesses are wrong. Greedily it runs in circles: most are right. The
limit is the time that the weights of all sweeps take. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_links import header, markdown
from make_random_model import Shape, write_model

from flexrun import LLM, SamplingParams
from flexrun.engine import Engine
from offload.tiers import parse_size

LEAST_RATIO = 0.97
"""Target: of the speed without guesses, where they are wrong."""
LEAST_SAVED = 1.3
"""Target: sweeps without over sweeps with guesses, where they are right."""
LEAST_GUESSED = 0.1
"""Of the generated tokens: with fewer guesses a comparison says nothing."""
TEMPERATURE = {"wrong": 1.0, "right": 0.0}


def run(model: Path, given: argparse.Namespace, job: str, speculation: str) -> dict[str, Any]:
    """One job: what its sweeps took, and its tokens."""
    draw = random.Random(given.seed)
    prompts = [
        {"prompt_token_ids": draw.choices(range(1, given.vocab), k=draw.randint(16, given.prompt))}
        for _ in range(given.requests)
    ]
    settings: dict[str, Any] = {
        "device": "emulated",
        "emulate": f"host-to-device={given.link}/s",
        "dtype": "float32",
        "weights": "host=100",
        "max_sequences": given.slots,
        "speculation": speculation,
        "seed": given.seed,
    }
    params = SamplingParams(
        temperature=TEMPERATURE[job], max_tokens=given.output, ignore_eos=True, seed=given.seed
    )
    with LLM(model, **settings) as llm:
        engine = llm._engine
        assert isinstance(engine, Engine)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        counters, weights = engine._counters, engine._runtime.weights.store.streamed_bytes
        return {
            "seconds": sum(counters.sweep_seconds),
            "sweeps": len(counters.sweep_seconds),
            "limit_seconds": len(counters.sweep_seconds) * weights / parse_size(given.link),
            "drafted": counters.drafted_tokens,
            "accepted": counters.accepted_tokens,
            "generated": counters.generated_tokens,
            "tokens": [output.outputs[0].token_ids for output in outputs],
        }


def measure(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Both jobs, with and without in turn; every second time in the other order."""
    pairs: dict[str, list[dict[str, Any]]] = {"wrong": [], "right": []}
    for job, repeats in (("wrong", given.repeats), ("right", 1)):
        for repeat in range(repeats):
            order = ("off", "lookup") if repeat % 2 == 0 else ("lookup", "off")
            pair: dict[str, Any] = {kind: run(model, given, job, kind) for kind in order}
            pair["identical"] = pair["off"].pop("tokens") == pair["lookup"].pop("tokens")
            pairs[job].append(pair)
    ratio = statistics.median(p["off"]["seconds"] / p["lookup"]["seconds"] for p in pairs["wrong"])
    right = pairs["right"][0]
    saved = right["off"]["sweeps"] / right["lookup"]["sweeps"]
    both = [*pairs["wrong"], *pairs["right"]]
    guessed = min(p["lookup"]["drafted"] / p["lookup"]["generated"] for p in both)
    told = guessed >= LEAST_GUESSED and all(pair["identical"] for pair in both)
    met = told and ratio >= LEAST_RATIO and saved >= LEAST_SAVED
    return {"pairs": pairs, "ratio": ratio, "saved": saved, "guessed": guessed, "met": met}


def show(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = []
    for job, pairs in report["pairs"].items():
        for pair in pairs:
            off, on = pair["off"], pair["lookup"]
            rows.append([
                job,
                f"{off['sweeps']}",
                f"{on['sweeps']}",
                f"{on['accepted']} of {on['drafted']}",
                f"{off['seconds']:.1f} ({off['limit_seconds'] / off['seconds']:.0%})",
                f"{on['seconds']:.1f} ({on['limit_seconds'] / on['seconds']:.0%})",
                f"{off['seconds'] / on['seconds']:.2f}",
                "yes" if pair["identical"] else "no",
            ])  # fmt: skip
    names = ["guesses are", "sweeps without", "sweeps with", "right guesses"]
    names += ["s without (of the limit)", "s with", "times faster", "same tokens"]
    return "\n".join([
        markdown(names, rows),
        "",
        f"where guesses are wrong: {report['ratio']:.3f} of the speed without (target "
        f"{LEAST_RATIO}); where they are right: {report['saved']:.2f} times fewer sweeps (target "
        f"{LEAST_SAVED}); at least {report['guessed']:.0%} as many guesses as tokens",
    ])  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=768)
    add("--vocab", type=int, default=12)
    add("--requests", type=int, default=48)
    add("--slots", type=int, default=16)
    add("--prompt", type=int, default=160)
    add("--output", type=int, default=64)
    add("--link", default="1GB", metavar="SIZE", help="bytes per second from HOST to the device")
    add("--repeats", type=int, default=5)
    add("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = Shape(given.layers, given.hidden, 12, 12, 2 * given.hidden, given.vocab, 8192)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        write_model(model, shape, "float32", given.seed)
        report = header("speculation", model) | measure(model, given)
    print(show(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
