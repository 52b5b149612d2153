"""Resident bfloat16 matrices are reordered on a CPU; everything else about a run stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from flexrun import LLM
from offload import packed
from tests.end_to_end.harness import Run, engine_of, generate
from tests.end_to_end.reference import ragged_prompts
from tests.tiny_models import byte_tokenizer, tiny_llama_config

pytestmark = pytest.mark.skipif(
    not packed.can_pack(), reason="this processor or torch cannot reorder bfloat16 matrices"
)
SIZES = {"hidden_size": 128, "intermediate_size": 192}
"""All matrices can be reordered without padding."""
PROMPTS = [list(text.encode()) for text in ragged_prompts(9, longest=40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config(**SIZES)).bfloat16().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def run(model: Path, **options: object) -> tuple[Run, int, list[torch.Tensor]]:
    """What a run did, its packed matrices, and the logits of its sweeps."""
    logits: list[torch.Tensor] = []
    with LLM(model, micro_batch_rows=64, num_micro_batches=3, **options) as llm:
        module = engine_of(llm)._runtime.model
        module.head.register_forward_hook(lambda *call: logits.append(call[2].clone()))
        count = sum(parameter.is_mkldnn for parameter in module.module.parameters())
        return generate(llm, PROMPTS, 5, ignore_eos=True), count, logits


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_same_logits_and_memory(model: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reordered, count, logits = run(model, device=device, weights="device=100")
    monkeypatch.setattr(packed, "can_pack", lambda: False)
    plain, none, expected = run(model, device=device, weights="device=100")
    assert (count, none) == (4 * 7 + 1, 0)
    assert reordered.summary["peak_bytes"] == plain.summary["peak_bytes"]
    for got, wanted in zip(logits[:3], expected[:3], strict=True):  # of the same tokens
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.03 * scale)


@pytest.mark.parametrize(
    ("device", "split", "share"),
    [("cpu", "host=100", 1.0), ("cpu", "device=50,disk=50", 0.5), ("emulated", "host=100", 0.0)],
)
def test_only_what_stays_where_it_is_computed_with(
    model: Path, tmp_path: Path, device: str, split: str, share: float
) -> None:
    everything = 4 * 7 + 1
    options = {"device": device, "weights": split, "offload_dir": tmp_path}
    _, count, _ = run(model, **options)
    assert abs(count - share * everything) <= everything / 6


def test_a_tied_table_stays_plain(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tied = LlamaForCausalLM(tiny_llama_config(**SIZES, tie_word_embeddings=True)).bfloat16()
    tied.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    result, count, _ = run(tmp_path, device="cpu", weights="device=100")
    assert count == 4 * 7
    assert [len(tokens) for tokens in result.tokens] == [5] * len(PROMPTS)
