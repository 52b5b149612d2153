"""A device that runs out of memory in a sweep: half the batch, and the same tokens."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from flexrun import LLM
from flexrun.errors import CapacityError
from tests.end_to_end.harness import engine_of, generate
from tests.end_to_end.test_quantized import PROMPTS

SETTINGS = {
    "device": "emulated",
    "weights": "device=20,host=40,disk=40",
    "kv_cache": "device=50,host=50",
    "micro_batch_rows": 32,
    "max_rows": 64,
    "max_sequences": 5,
}


@pytest.fixture
def short_of_memory(monkeypatch):
    """Layers that have memory for so many rows only, from a layer and a sweep on."""

    def limit(rows: int, after: int) -> list[int]:
        calls: list[int] = []
        forward = LlamaMLP.forward

        def limited(self, x: torch.Tensor) -> torch.Tensor:
            if x.device.type == "meta":
                return forward(self, x)  # a model that is being built
            calls.append(x.shape[1])
            if len(calls) > after and x.shape[1] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, x)

        monkeypatch.setattr(LlamaMLP, "forward", limited)
        return calls

    return limit


@pytest.mark.parametrize("after", [3, 12])
def test_half_the_batch_gives_the_same_tokens(tiny_llama_dir, tmp_path, short_of_memory, after):
    """From 32 rows to 16 and 8, with sequences that wait, that run, and that are over."""
    with LLM(tiny_llama_dir, offload_dir=tmp_path, **SETTINGS) as llm:
        expected = generate(llm, PROMPTS, 9).tokens
    calls = short_of_memory(8, after)
    with LLM(tiny_llama_dir, offload_dir=tmp_path, **SETTINGS) as llm:
        found = generate(llm, PROMPTS, 9).tokens
        policy = engine_of(llm)._runtime.policy
        assert (policy.micro_batch_rows, policy.max_rows) == (8, 16)
        assert str(policy.kv_cache) == "device=50,host=50,disk=0"
    assert found == expected
    assert max(calls[:after]) > 8  # the limit was met when something had been computed


def test_where_not_even_a_row_has_memory_the_run_ends(tiny_llama_dir, tmp_path, short_of_memory):
    """With what is missing and what to do."""
    with LLM(tiny_llama_dir, offload_dir=tmp_path, **SETTINGS) as llm:
        short_of_memory(0, 0)
        with pytest.raises(CapacityError, match="not even for one row") as caught:
            generate(llm, PROMPTS, 2)
        assert "--device-memory" in str(caught.value)
