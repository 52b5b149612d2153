"""However late copies come, results are the same: nothing relies on a link being fast."""

from __future__ import annotations

import pytest

from tests.end_to_end.harness import run
from tests.end_to_end.reference import greedy_tokens, ragged_prompts
from tests.late_copies import make_copies_late

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [list(text.encode()) for text in ragged_prompts(16, longest=7)]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def reference(tiny_llama_dir) -> list[list[int]]:
    return greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kv_cache", ["host=100", "disk=100", "device=40,host=30,disk=30"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_tokens_do_not_depend_on_when_bytes_arrive(
    tiny_llama_dir, reference, monkeypatch, device, kv_cache, seed
):
    """Weights, KV pages and activations on all tiers, sequences that take each other's pages."""
    make_copies_late(monkeypatch, seed)
    done = run(
        tiny_llama_dir,
        PROMPTS,
        NEW_TOKENS,
        device=device,
        dtype="float32",
        weights="device=25,host=40,disk=35",
        kv_cache=kv_cache,
        activations="host=100",
        max_rows=24,
        num_micro_batches=3,
        micro_batch_rows=8,
        max_sequences=6,
    )
    assert done.tokens == reference
    assert max(done.micro_batches) >= 3
