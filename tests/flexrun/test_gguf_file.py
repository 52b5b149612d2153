"""A GGUF file becomes a checkpoint with the same weights, settings and tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from flexrun.errors import CheckpointError, UsageError
from flexrun.model_files import resolve_model

needs_gguf = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")),
    reason="needs the packages gguf and accelerate",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def some_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF, or so it says")
    return path


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A random one-layer Llama with 300 tokens; returns its tensors by GGUF name."""
    import gguf

    hidden, inner, vocabulary = 32, 64, 300
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(hidden // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    words = ["<unk>", "<s>", "</s>", "a", "b", "ab", "ba"]
    writer.add_token_list(words + [chr(256 + i) for i in range(vocabulary - len(words))])
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {
        "token_embd.weight": (vocabulary, hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (hidden, hidden),
        "blk.0.attn_k.weight": (hidden // 2, hidden),
        "blk.0.attn_v.weight": (hidden // 2, hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_gate.weight": (inner, hidden),
        "blk.0.ffn_up.weight": (inner, hidden),
        "blk.0.ffn_down.weight": (hidden, inner),
    }
    tensors = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_missing_package_is_named(some_gguf: Path, monkeypatch):
    """Without the package gguf the error has the command that installs it."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name)
    )
    with pytest.raises(UsageError, match="pip install gguf"):
        resolve_model(some_gguf)


@needs_gguf
def test_full_disk_is_told_from_a_bad_file(tmp_path: Path, monkeypatch):
    """A conversion that cannot be written asks for space, and does not blame the file."""
    from safetensors import SafetensorError
    from transformers import LlamaForCausalLM

    def fail(*_args, **_kwargs):
        raise SafetensorError("No space left on device")

    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(UsageError, match="No space left on device") as caught:
        resolve_model(tmp_path / "tiny.gguf")
    assert "FLEXRUN_CACHE" in str(caught.value)


@needs_gguf
def test_corrupt_gguf_is_refused(some_gguf: Path, cache: Path):
    """A file that is no GGUF file is refused and leaves nothing in the cache."""
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.gguf as a GGUF model"):
        resolve_model(some_gguf)
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


@needs_gguf
def test_gguf_is_converted_once(tmp_path: Path, cache: Path, capfd):
    """A GGUF file becomes a bfloat16 checkpoint with its tokenizer; the second time it is there."""
    from transformers import AutoConfig, AutoTokenizer

    from offload.safetensors_file import SINGLE_FILE, read_header

    path = tmp_path / "tiny.gguf"
    tensors = write_gguf(path)
    directory = resolve_model(path)
    assert capfd.readouterr() == ("", "")
    assert directory.parent == cache / "models"
    config = AutoConfig.from_pretrained(directory)
    assert config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == 100000.0
    stored = {tensor.key: tensor for tensor in read_header(directory / SINGLE_FILE)}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    expected = torch.from_numpy(tensors["token_embd.weight"]).bfloat16()
    assert torch.equal(stored["model.embed_tokens.weight"].read(), expected)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    assert (directory / "generation_config.json").is_file()
    before = directory.stat().st_mtime_ns
    assert resolve_model(path) == directory
    assert directory.stat().st_mtime_ns == before


@needs_gguf
def test_gguf_cut_short_is_refused(tmp_path: Path):
    """A GGUF file whose end is missing is refused."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cannot read .*tiny\.gguf"):
        resolve_model(path)


@pytest.mark.slow
@needs_gguf
def test_demo_model_is_converted_right(smollm2_dir: Path):
    """SmolLM2 keeps its end token, chat template, rotary base and tied embeddings."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(smollm2_dir)
    assert (config.eos_token_id, config.tie_word_embeddings) == (2, True)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert GenerationConfig.from_pretrained(smollm2_dir).eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
