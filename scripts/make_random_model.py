"""Writes a random Llama checkpoint of a named size: something to measure speed with, offline.

The weights are normal with Llama's initializer range, drawn through a table of 65536 quantiles, one
tensor at a time: 7b takes two minutes and little memory. No end-of-sequence token is declared,
so generation has the length that is asked for. Safe to run twice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

SHARD_BYTES = 2_000_000_000
BLOCK = 1 << 21  # elements drawn at once
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
STAMP = "random_model.json"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")


@dataclass(frozen=True)
class Shape:
    """What distinguishes one Llama from another."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int


SIZES = {
    "tiny": Shape(4, 256, 8, 4, 704, 1024, 2048),
    "1.1b": Shape(22, 2048, 32, 4, 5632, 32000, 2048),
    "7b": Shape(32, 4096, 32, 32, 11008, 32000, 4096),
}


class ModelError(Exception):
    """What went wrong, and what to do about it."""


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the order in which a forward pass meets them."""
    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, hidden)}
    for layer in range(shape.layers):
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (shape.ffn, hidden),
            "mlp.up_proj": (shape.ffn, hidden),
            "mlp.down_proj": (hidden, shape.ffn),
        }
        names |= {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
    return names | {"model.norm.weight": (hidden,), "lm_head.weight": (shape.vocab, hidden)}


def config_of(shape: Shape, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
    }


def quantile_table(dtype: str, scale: float = 0.02) -> np.ndarray:
    """The normal distribution at 65536 probabilities, as the integers that `dtype` is stored as."""
    probabilities = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    values = (torch.special.ndtri(probabilities) * scale).to(getattr(torch, dtype))
    return values.view(torch.int32 if dtype == "float32" else torch.int16).numpy()


def one_bits(dtype: str) -> int:
    """The number one, as the integer that `dtype` is stored as."""
    return {"bfloat16": 0x3F80, "float16": 0x3C00, "float32": 0x3F800000}[dtype]


def blocks(table: np.ndarray, count: int, seed: int, number: int) -> Iterator[np.ndarray]:
    """`count` random elements of tensor `number`, whatever shard it is in."""
    draw = np.random.Generator(np.random.SFC64([seed, number]))
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        yield table[np.frombuffer(draw.bytes(2 * size), dtype="<u2")]


def shards(sizes: dict[str, int]) -> list[list[str]]:
    """The tensors' names, in order, in groups of at most `SHARD_BYTES`."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, nbytes in sizes.items():
        if groups[-1] and used + nbytes > SHARD_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += nbytes
    return groups


def header_of(names: list[str], shapes: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    """The beginning of a safetensors file."""
    width = 4 if dtype == "float32" else 2
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + width * math.prod(shapes[name])
        entries[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def finish_file(file: BinaryIO) -> None:
    """Leave the file on disk and not in the page cache, which others may need."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_weights(directory: Path, shape: Shape, dtype: str, seed: int) -> None:
    """Writes the shards, one block of one tensor after another, and their index."""
    shapes, table = tensor_shapes(shape), quantile_table(dtype)
    sizes = {name: math.prod(size) * table.itemsize for name, size in shapes.items()}
    numbers = {name: number for number, name in enumerate(shapes)}
    groups, weight_map = shards(sizes), {}
    for position, names in enumerate(groups, 1):
        path = directory / f"model-{position:05d}-of-{len(groups):05d}.safetensors"
        print(f"writing {path.name} ({position} of {len(groups)})", file=sys.stderr)
        with path.open("wb") as file:
            file.write(header_of(names, shapes, dtype))
            for name in names:
                weight_map[name] = path.name
                count = math.prod(shapes[name])
                if len(shapes[name]) == 1:
                    file.write(np.full(count, one_bits(dtype), dtype=table.dtype).data)
                    continue
                for block in blocks(table, count, seed, numbers[name]):
                    file.write(block.data)
            finish_file(file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object for people and programs."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies the tokenizer's files. Raises `ModelError`."""
    files = {path for pattern in TOKENIZER_FILES for path in source.glob(pattern)}
    if not files:
        raise ModelError(f"{source} has no tokenizer\nhint: name a directory with tokenizer.json")
    for path in files:
        shutil.copy(path, directory)


def already_there(directory: Path, stamp: dict[str, Any]) -> bool:
    """Whether `directory` is the model asked for. Raises `ModelError` if it is anything else."""
    if not directory.exists():
        return False
    path = directory / STAMP
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if found == stamp:
        return True
    what = f"holds {found}" if found else "exists and was not written by this script"
    raise ModelError(f"{directory} {what}\nhint: name another directory, or remove it")


def write_model(directory: Path, shape: Shape, dtype: str, seed: int) -> None:
    """Write all files of a model into an existing directory."""
    write_json(directory / "config.json", config_of(shape, dtype))
    write_json(directory / "generation_config.json", {"do_sample": False})
    write_weights(directory, shape, dtype, seed)


def make_model(size: str, directory: Path, seed: int, dtype: str, tokenizer: Path | None) -> bool:
    """Writes the model unless it is there. Raises `ModelError`; returns whether it wrote."""
    stamp = {"size": size, "seed": seed, "dtype": dtype}
    if already_there(directory, stamp):
        return False
    shape, parent = SIZES[size], directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    elements = sum(math.prod(dims) for dims in tensor_shapes(shape).values())
    needed = elements * (4 if dtype == "float32" else 2)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ModelError(
            f"{size} in {dtype} needs {needed / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB "
            "free\nhint: name a directory on a larger disk"
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=parent))
    try:
        temporary.chmod(0o755)
        write_model(temporary, shape, dtype, seed)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, temporary)
        write_json(temporary / STAMP, stamp)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def main() -> None:
    """Prints the model's directory as the last line of standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="copy this tokenizer")
    given = parser.parse_args()
    try:
        wrote = make_model(given.size, given.directory, given.seed, given.dtype, given.tokenizer)
    except ModelError as error:
        sys.exit(f"error: {error}")
    if not wrote:
        print(f"{given.directory} is already there", file=sys.stderr)
    print(given.directory)


if __name__ == "__main__":
    main()
