"""The random checkpoints and the byte tokenizer are what the other tests take them for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE

TEXTS = ["hello", "two words", " spaces  kept ", "line\nbreak\t", "naïve 語 🙂", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_bytes(tiny_llama_dir: Path, text: str):
    """A text's token ids are its UTF-8 bytes, and decode to the same text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_tokenizer_knows_its_end_and_its_size(tiny_llama_dir: Path):
    """Token 0 ends a sequence, is left out of texts, and there are 256 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    assert tokenizer.eos_token_id == EOS_TOKEN_ID
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.decode([104, 105, EOS_TOKEN_ID], skip_special_tokens=True) == "hi"


def test_tokenizer_has_a_chat_template(tiny_llama_dir: Path):
    """Messages become text by a template that ends where the assistant begins."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "user: hi\nassistant: "


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_loads_in_float32(request: pytest.FixtureRequest, tied: bool):
    """The checkpoints load in float32; the tied one shares embedding and output head."""
    directory = request.getfixturevalue("tiny_tied_llama_dir" if tied else "tiny_llama_dir")
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_prompts_get_different_answers(tiny_llama_dir: Path):
    """Greedy answers depend on the prompt, so mixing up two sequences would be seen."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    answers = set()
    for prompt in (b"one", b"another", b"yes", b"something longer"):
        ids = torch.tensor([list(prompt)])
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=EOS_TOKEN_ID)
        answers.add(tuple(out[0, len(prompt) :].tolist()))
    assert len(answers) == 4
