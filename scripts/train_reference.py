"""Trains a small Llama from scratch in float32, to judge what rounding its weights does to it.

Published small models come quantized, or were trained with what rounding takes from them. This one
has never seen a rounded weight: 4 layers of 256 values, a vocabulary of 2048, trained on two passes
over a public-domain text, in five minutes on two cores. The same machine and versions give the same
model. It is kept in the cache; the last line on stdout is its directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from get_text import texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policy_search.machine import cache_dir

END = "<|end|>"


@dataclass(frozen=True)
class Recipe:
    """All that the result depends on, besides the text and the versions."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 704
    vocab: int = 2048
    context: int = 256
    batch: int = 4
    passes: float = 2.0
    rate: float = 3e-3
    seed: int = 0
    threads: int = 2


def trained(recipe: Recipe) -> Path:
    """The model's directory; trains it first if that was not done yet."""
    train, _ = texts()
    facts = [asdict(recipe), torch.__version__, transformers.__version__]
    digest = hashlib.sha256(json.dumps(facts).encode() + train.read_bytes()).hexdigest()[:16]
    target = cache_dir() / "models" / f"reference-{digest}"
    if not target.exists():
        unfinished = target.with_name(f".{target.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        _train(recipe, train.read_text(encoding="utf-8"), unfinished)
        unfinished.rename(target)
    return target


def _train(recipe: Recipe, text: str, target: Path) -> None:
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    tokenizer = _tokenizer(text, recipe.vocab)
    tokenizer.save_pretrained(target)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    model = LlamaForCausalLM(_config(recipe, tokenizer.convert_tokens_to_ids(END)))
    count = len(tokens) // recipe.context
    windows = tokens[: count * recipe.context].view(count, recipe.context)
    steps = int(count * recipe.passes) // recipe.batch
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    order = torch.cat([torch.randperm(count) for _ in range(math.ceil(recipe.passes))])
    with tqdm(total=steps, unit="step", file=sys.stderr) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * _share_of_rate(step, steps)
            rows = windows[order[step * recipe.batch : (step + 1) * recipe.batch]]
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    model.save_pretrained(target)


def _share_of_rate(step: int, steps: int) -> float:
    """A twentieth of the steps to warm up, then half a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def _config(recipe: Recipe, end: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        dtype="float32",
    )


def _tokenizer(text: str, vocab: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def main() -> None:
    """Train, or find, and print where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    print(trained(Recipe(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
