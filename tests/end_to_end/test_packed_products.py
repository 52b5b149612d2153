"""Sweeps of few rows that multiply packed matrices, here by plain operations: the same tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from compression import product_gpu
from flexrun import LLM
from flexrun.plan import SweepPlan
from offload import packed_matrix
from offload.expansion import Expansion
from offload.slabs import Weight
from tests.backends import make_copies_late
from tests.end_to_end.harness import Run, engine_of, generate
from tests.end_to_end.test_quantized import NEW_TOKENS, PROMPTS, settings

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = 4
"""Rows that are multiplied with packed matrices here."""
MATRICES = 4 * 5
"""Of layers: those of keys and values are too small to be quantized."""


@pytest.fixture
def counts(monkeypatch) -> Counter[str]:
    """Forces the choice; counts products, and expansions of matrices of layers and the head."""
    found: Counter[str] = Counter()
    expand = Weight.expand

    def multiply(x: torch.Tensor, *others: Any) -> torch.Tensor:
        found["products"] += 1
        return product_gpu.reference(x, *others[:-1])

    def counted(self: Weight, *args: Any) -> torch.nn.Parameter:
        if self.spec is not None:
            found["head" if "lm_head" in self.name else "layers"] += 1
        return expand(self, *args)

    def few(self: Expansion, weight: Weight, rows: list[int]) -> bool:
        return max(rows) <= FEW and self.can_stay_packed(weight)

    monkeypatch.setattr(packed_matrix, "multiply", multiply)
    monkeypatch.setattr(Weight, "expand", counted)
    monkeypatch.setattr(Expansion, "stays_packed", few)
    return found


def most_logits(plan: SweepPlan) -> int:
    """Rows that the head gets in the largest micro-batch."""
    return max(
        sum(1 + span.drafts for span in batch.spans if span.wants_logits)
        for batch in plan.micro_batches
    )


def expanded_bytes(llm: LLM) -> tuple[int, int]:
    """In all sweeps so far, and in each if all is expanded."""
    runtime = engine_of(llm)._runtime
    return runtime.weights.store.expanded_bytes, runtime.shape.expanded_in_sweep


def done_with(llm: LLM) -> Run:
    return generate(llm, PROMPTS, NEW_TOKENS)


@pytest.mark.parametrize("weights", ["device=100", "device=25,host=50,disk=25", "disk=100"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_tokens_are_those_of_expanded_matrices(
    tiny_llama_dir, tmp_path_factory, counts, monkeypatch, device, weights
):
    """Packed bytes that are read until a unit is done; and nothing is expanded where they are."""
    offload = tmp_path_factory.getbasetemp() / "packed_products"
    chosen = settings(device, weights, offload, weight_bits=4, head_bits=8)
    with LLM(tiny_llama_dir, **chosen) as llm:
        done = done_with(llm)
        expanded, plain = expanded_bytes(llm)
    many = sum(max(batch.rows for batch in plan.micro_batches) > FEW for plan in done.plans)
    heads = sum(most_logits(plan) > FEW for plan in done.plans)
    assert 0 < many < len(done.plans)
    assert counts["layers"] == many * MATRICES
    assert counts["head"] == heads
    sweeps = len(done.plans)
    assert 0 < expanded < sweeps * plain
    packed = (sweeps - many) * MATRICES + sweeps - heads
    assert counts["products"] > packed, "several micro-batches ride"
    monkeypatch.undo()
    with LLM(tiny_llama_dir, **chosen) as llm:
        assert done_with(llm).tokens == done.tokens
        expanded, plain = expanded_bytes(llm)
    assert expanded == sweeps * plain


@pytest.mark.parametrize("attention", ["device", "host"])
def test_packed_bytes_are_there_until_the_last_product(
    tiny_llama_dir, tmp_path_factory, counts, monkeypatch, attention
):
    """However late copies come, and where layers break off in attention."""
    offload = tmp_path_factory.getbasetemp() / "packed_products"
    more = {"weight_bits": 4, "head_bits": 8, "kv_cache": "host=100", "attention": attention}
    chosen = settings("emulated", "host=50,disk=50", offload, **more)
    found = []
    for late in (False, True):
        if late:
            make_copies_late(monkeypatch, seed=0)
        with LLM(tiny_llama_dir, **chosen) as llm:
            found.append(done_with(llm).tokens)
    assert counts["products"] > 0
    monkeypatch.undo()
    with LLM(tiny_llama_dir, **chosen) as llm:
        assert found == [done_with(llm).tokens] * 2


def test_plain_weights_are_never_packed(tiny_llama_dir, tmp_path, counts):
    """Neither those of the type that is computed in nor those that are only widened."""
    for dtype in ("float32", "bfloat16"):
        with LLM(tiny_llama_dir, **settings("cpu", "disk=100", tmp_path) | {"dtype": dtype}) as llm:
            sweeps = len(done_with(llm).plans)
            expanded, plain = expanded_bytes(llm)
            assert expanded == sweeps * plain
    assert counts["products"] == 0
