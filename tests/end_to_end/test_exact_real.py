"""A real model of 135M parameters gives the greedy tokens of transformers under any policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexrun.tokenizer import Tokenizer
from tests.end_to_end.harness import SPLITS, cached_reference, run
from tests.end_to_end.reference import ragged_prompts

# A second thread would wait for those of the tests beside this one.
pytestmark = pytest.mark.usefixtures("one_thread")

CHOSEN = [
    ("cpu", "disk=100", "device=100", 3),
    ("cpu", "device=25,host=50,disk=25", "device=50,host=50", 1),
    ("emulated", "device=25,host=50,disk=25", "host=100", 3),
    ("emulated", "host=100", "device=50,host=50", 4),
    ("cpu", "device=100", "device=50,disk=50", 3),
    ("emulated", "device=25,host=50,disk=25", "device=30,host=30,disk=40", 4),
]


def smol_prompts(directory: Path, count: int, longest: int = 60) -> list[list[int]]:
    encode = Tokenizer.load(directory).encode
    return [list(encode(text)) for text in ragged_prompts(count, longest=longest)]


def smol_settings(
    device: str, weights: str, kv_cache: str, micro_batches: int, rows: int = 512
) -> dict[str, Any]:
    """`rows` a sweep; the emulated device has less memory than the model has weights (539 MB)."""
    settings: dict[str, Any] = {"device": device, "weights": weights, "kv_cache": kv_cache}
    if device == "emulated":
        settings["emulate"] = f"capacity={'900MiB' if weights == 'device=100' else '480MiB'}"
    cuts = {"num_micro_batches": micro_batches, "micro_batch_rows": rows // micro_batches}
    return settings | cuts | {"dtype": "float32", "max_rows": rows, "max_sequences": 64}


@pytest.mark.parametrize(("device", "weights", "kv_cache", "micro_batches"), CHOSEN)
def test_chosen_policies(smollm2_dir, pytestconfig, device, weights, kv_cache, micro_batches):
    """From every tier, on both devices, in several micro-batches: the same tokens.

    One prompt is cut: all have more tokens than a sweep has rows.
    """
    prompts = smol_prompts(smollm2_dir, 16, longest=30)
    assert sum(map(len, prompts)) > 224
    reference = cached_reference(pytestconfig, smollm2_dir, prompts, 8)
    settings = smol_settings(device, weights, kv_cache, micro_batches, rows=224)
    done = run(smollm2_dir, prompts, 8, **settings)
    assert done.tokens == reference
    assert max(done.micro_batches) >= micro_batches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overlap", "kv_cache", "micro_batches"),
    [
        (True, "device=100", 1),
        (True, "device=100", 3),
        (True, "host=100", 1),
        (True, "host=100", 3),
        (False, "host=100", 3),
    ],
)
@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_every_policy(smollm2_dir, pytestconfig, device, weights, kv_cache, micro_batches, overlap):
    """64 ragged prompts and 32 tokens each are exact for every placement of a real model."""
    prompts = smol_prompts(smollm2_dir, 64)
    reference = cached_reference(pytestconfig, smollm2_dir, prompts, 32)
    settings = smol_settings(device, weights, kv_cache, micro_batches)
    done = run(smollm2_dir, prompts, 32, overlap=overlap, **settings)
    assert done.tokens == reference
    assert max(done.micro_batches) >= micro_batches
