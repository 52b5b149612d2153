"""In-memory speed: flexrun against transformers' `generate` on the same ragged prompts, paired.

256 prompts of 16-256 tokens, 32-128 new tokens each, greedy, no early stop. transformers runs
static batches sorted by length at each of several batch sizes and is judged by its best. Both run
in turn in one process; the machine's matrix-product rate is measured beside them and is the limit
stated. On a processor without 16-bit products transformers is faster with `--peer-dtype float32`,
at twice the memory; flexrun keeps its weights in bfloat16 all the same. The last line on stdout is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexrun import LLM, SamplingParams


def workload(count: int, vocab: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Ragged, distinct prompts of token ids, and the number of new tokens of each."""
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(3, vocab) for _ in range(draw.randint(16, 256))] for _ in range(count)
    ]
    return prompts, [draw.randint(32, 128) for _ in range(count)]


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a matrix product over 2048 rows, the best of several in either type.

    A processor without 16-bit products is faster in float32, where flexrun then computes.
    """
    best = float("inf")
    for dtype in (torch.bfloat16, torch.float32):
        rows, weight = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
        for _ in range(6):
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight).sum().item()
            best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def run_transformers(
    model: Any, prompts: list[list[int]], new: list[int], batch: int, device: torch.device
) -> float:
    """Seconds for static, left-padded batches, similar lengths together, each to its longest."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + new[i])
    start = time.perf_counter()
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in chosen])
        mask = (ids != 0).long()
        with torch.inference_mode():
            model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(new[i] for i in chosen),
                min_new_tokens=max(new[i] for i in chosen),
                do_sample=False,
                pad_token_id=0,
            )
    return time.perf_counter() - start


def run_flexrun(llm: LLM, prompts: list[list[int]], new: list[int]) -> float:
    """Seconds for the same work."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in new]
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return time.perf_counter() - start


def flops(model: Any, prompts: list[list[int]], new: list[int]) -> float:
    """Products that cannot be avoided: every row through the layers, one head row a new token."""
    table = model.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - table
    rows = sum(len(p) + n - 1 for p, n in zip(prompts, new))
    return 2.0 * (body * rows + table * sum(new))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--peer-dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--quick", action="store_true", help="32 requests, one run of each")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.requests, arguments.repeats, arguments.batches = 32, 1, [16]
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.peer_dtype)
    vocab = AutoConfig.from_pretrained(arguments.model).get_text_config().vocab_size
    prompts, new = workload(arguments.requests, vocab, seed=0)
    reference = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    llm = LLM(arguments.model, device=arguments.device, dtype="bfloat16")
    run_flexrun(llm, prompts[:16], [8] * 16)  # warm both up
    run_transformers(reference, prompts[:16], [8] * 16, 16, device)
    tokens, ours, theirs = sum(new), [], {b: [] for b in arguments.batches}
    rates = []
    best: int | None = None
    for repeat in range(arguments.repeats):
        rates.append(matmul_rate(device))
        ours.append(tokens / run_flexrun(llm, prompts, new))
        print(f"run {repeat}: flexrun {ours[-1]:.1f} tok/s", file=sys.stderr)
        # All batch sizes once; then the best one only, paired with every run of ours.
        for batch in arguments.batches if best is None else [best]:
            theirs[batch].append(tokens / run_transformers(reference, prompts, new, batch, device))
            print(f"  transformers, batch {batch}: {theirs[batch][-1]:.1f} tok/s", file=sys.stderr)
        best = max(theirs, key=lambda b: theirs[b][-1] if theirs[b] else 0)
    assert best is not None
    ratios = [a / b for a, b in zip(ours, theirs[best])]
    rate = statistics.median(rates)
    limit = tokens / (flops(reference, prompts, new) / rate)
    mine = statistics.median(ours)
    print(f"flexrun       {mine:8.1f} tok/s = {mine / limit:.0%} of the matrix-product limit")
    other = statistics.median(theirs[best])
    print(f"transformers  {other:8.1f} tok/s = {other / limit:.0%} (batch {best}, its best)")
    print(f"limit         {limit:8.1f} tok/s at {rate / 1e9:.0f} GFLOP/s measured")
    print(
        json.dumps(
            {
                "flexrun_tokens_per_second": mine,
                "transformers_tokens_per_second": other,
                "transformers_batch": best,
                "transformers_dtype": arguments.peer_dtype,
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "limit_tokens_per_second": limit,
                "share_of_limit": mine / limit,
                "matmul_flops": rate,
                "requests": len(prompts),
                "generated_tokens": tokens,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
