"""Activations of waiting micro-batches on HOST: the same tokens, bytes in both directions."""

from __future__ import annotations

from typing import Any

import pytest

from flexrun.errors import UsageError
from tests.end_to_end.harness import run
from tests.end_to_end.reference import greedy_tokens, ragged_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [list(text.encode()) for text in ragged_prompts(14, longest=7)]
NEW_TOKENS = 6
ROW_BYTES = 64 * 4
"""Of the tiny Llama's hidden states in float32."""


@pytest.fixture(scope="module")
def reference(tiny_llama_dir) -> list[list[int]]:
    return greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])


def settings(activations: str, micro_batches: int = 4, **more: Any) -> dict[str, Any]:
    common = {"device": "emulated", "dtype": "float32", "activations": activations}
    cut = {"num_micro_batches": micro_batches, "micro_batch_rows": 48 // micro_batches}
    return common | cut | {"max_rows": 48, "max_sequences": 12} | more


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("kv_cache", ["device=100", "host=100"])
@pytest.mark.parametrize("activations", ["host=100", "device=50,host=50"])
def test_tokens_are_the_same(tiny_llama_dir, reference, activations, kv_cache, overlap):
    """From several micro-batches whose activations come and go, transformers' tokens."""
    more = {"weights": "device=25,host=50,disk=25", "kv_cache": kv_cache, "overlap": overlap}
    speeds = "host-to-device=100MB/s,device-to-host=100MB/s"
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **settings(activations, emulate=speeds, **more))
    assert done.tokens == reference
    kinds = done.summary["bytes_by_kind"]
    sent, back = (kinds[link]["activations"] for link in ("device->host", "host->device"))
    assert 0 < back <= sent


@pytest.mark.parametrize(("share", "most"), [(100, 1.0), (50, 0.75)])
def test_without_overlap_every_wait_is_a_round_trip(tiny_llama_dir, share, most):
    """Step by step, what waits between two layers crosses to HOST and back, to the byte."""
    split = f"device={100 - share},host={share}"
    done = run(tiny_llama_dir, PROMPTS, 2, **settings(split, overlap=False))
    kinds = done.summary["bytes_by_kind"]
    sent = kinds["device->host"]["activations"]
    assert sent == kinds["host->device"]["activations"]
    rows = [plan.rows for plan in done.plans if len(plan.micro_batches) > 1]
    everything = sum(rows) * 4 * ROW_BYTES  # before each of the four layers
    assert everything * share / 100 * 0.75 <= sent <= everything * most
    if share == 100:
        assert sent == everything


def test_the_budget_counts_what_waits(tiny_llama_dir):
    """HOST holds room for the waiting rows, and none where they stay on the device."""
    peaks = {
        split: run(tiny_llama_dir, PROMPTS, 2, **settings(split)).summary["peak_bytes"]["host"]
        for split in ("device=100", "host=100")
    }
    assert peaks["host=100"] - peaks["device=100"] == 48 * ROW_BYTES


def test_one_micro_batch_never_waits(tiny_llama_dir):
    """A sweep of a single micro-batch moves no activations."""
    done = run(tiny_llama_dir, PROMPTS, 2, **settings("host=100", micro_batches=1))
    kinds = done.summary["bytes_by_kind"].values()
    assert not any("activations" in kind for kind in kinds)


def test_disk_is_refused(tiny_llama_dir):
    """Activations live in memory only; the error names the flag."""
    with pytest.raises((UsageError, ValueError), match="activations cannot live on disk"):
        run(tiny_llama_dir, PROMPTS, 2, **settings("disk=100"))
