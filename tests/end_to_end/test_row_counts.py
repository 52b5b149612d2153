"""Micro-batches filled up to round numbers of rows: the same tokens, few numbers."""

from __future__ import annotations

import pytest

from flexrun import LLM
from flexrun.row_counts import EXACT_ROWS, rounded
from flexrun.runtime import Runtime
from tests.end_to_end.harness import engine_of, generate
from tests.end_to_end.reference import greedy_tokens, ragged_prompts


def test_few_counts_that_add_little():
    counts = {rounded(rows) for rows in range(1, 4097)}
    assert len(counts) == EXACT_ROWS + 8 * 8  # eight between each two of 16, 32, ... 4096
    for rows in range(1, 4097):
        assert rows <= rounded(rows) <= max(EXACT_ROWS, rows * 9 / 8)
        assert rounded(rounded(rows)) == rounded(rows)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_tokens_are_those_of_exact_rows(tiny_llama_dir, device, monkeypatch):
    """With sequences that end one by one, prompts in chunks and numbers that are not round."""
    monkeypatch.setattr(Runtime, "_compiles_per_row_count", lambda _: True)
    prompts = [list(text.encode()) for text in ragged_prompts(40, longest=9)]
    options = {"kv_cache": "device=100", "weights": "device=50,host=50", "dtype": "float32"}
    if device == "emulated":
        options |= {"kv_cache": "device=50,host=50", "activations": "host=100"}
    seen: list[int] = []
    with LLM(
        tiny_llama_dir,
        device=device,
        micro_batch_rows=37,
        max_sequences=40,
        max_rows=111,
        **options,
    ) as llm:
        layer = engine_of(llm)._runtime.model.layers[1]
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        done = generate(llm, prompts, 6, ignore_eos=True)
    exact = [batch.rows for plan in done.plans for batch in plan.micro_batches]
    assert seen == [min(rounded(rows), 37) for rows in exact]
    assert sum(filled != rows for filled, rows in zip(seen, exact)) > 2
    assert max(done.micro_batches) >= 3
    assert done.tokens == greedy_tokens(tiny_llama_dir, prompts, 6, [-1])
