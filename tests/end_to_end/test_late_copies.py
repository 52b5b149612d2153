"""However late copies come, results are the same: nothing relies on a link being fast."""

from __future__ import annotations

import pytest

from tests.backends import make_copies_late
from tests.end_to_end.harness import run
from tests.end_to_end.reference import greedy_tokens, ragged_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [list(text.encode()) for text in ragged_prompts(16, longest=7)]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def reference(tiny_llama_dir) -> list[list[int]]:
    return greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])


@pytest.mark.parametrize(
    ("device", "kv_cache"),
    [
        ("emulated", "host=100"),
        ("emulated", "disk=100"),
        ("emulated", "device=40,host=30,disk=30"),
        ("cpu", "disk=100"),
    ],
)
def test_tokens_do_not_depend_on_when_bytes_arrive(
    tiny_llama_dir, reference, monkeypatch, device, kv_cache
):
    """Weights, KV pages and activations on all tiers, sequences that take each other's pages."""
    make_copies_late(monkeypatch, seed=0)
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
