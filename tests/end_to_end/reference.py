"""What transformers generates: the outer reference of every exactness test."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

WORDS = """
the river runs north past an old mill where children once learned to read maps while engineers
argued about steam pressure copper wire winter wheat prices and whether a printed book could ever
be copied faster than a clerk can write seven letters by hand
""".split()  # noqa: SIM905  (a list of words would be formatted one a line)

_known: dict[tuple[Any, ...], list[list[int]]] = {}


def ragged_prompts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """`count` distinct texts of 2 to `longest` words."""
    draw = random.Random(seed)
    return [
        f"{i}: " + " ".join(draw.choices(WORDS, k=draw.randint(2, longest))) for i in range(count)
    ]


def greedy_tokens(
    directory: Path, prompts: list[list[int]], new_tokens: int, end_ids: list[int], batch: int = 16
) -> list[list[int]]:
    """Greedy continuations by `generate`: eager attention, float32, left-padded batches.

    Many tests have the same reference: it is kept as long as the model's files stay as they are.
    """
    stats = [(path.name, path.stat()) for path in sorted(directory.iterdir())]
    files = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    key = directory, files, tuple(map(tuple, prompts)), new_tokens, tuple(end_ids), batch
    if key not in _known:
        _known[key] = _generated(directory, prompts, new_tokens, end_ids, batch)
    return [list(tokens) for tokens in _known[key]]


def _generated(
    directory: Path, prompts: list[list[int]], new_tokens: int, end_ids: list[int], batch: int
) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in chosen])
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        )
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=end_ids,
                pad_token_id=end_ids[0],
                repetition_penalty=1.0,
            )
        for i, row in zip(chosen, out[:, width:].tolist()):
            end = next((k + 1 for k, token in enumerate(row) if token in end_ids), len(row))
            results[i] = row[:end]
    return results
