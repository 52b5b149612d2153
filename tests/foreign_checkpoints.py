"""Tiny checkpoints as GPTQ, AWQ and compressed-tensors write them, packed code by code."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import byte_tokenizer

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Matrix = list[list[int]]


def _word(codes: list[int]) -> int:
    """Eight codes in an int32, the first in the lowest bits."""
    word = sum(code << 4 * place for place, code in enumerate(codes))
    return word - (1 << 32) if word >= 1 << 31 else word


def _words(codes: Matrix, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Rows of codes as rows of an eighth of the words."""
    rows = [
        [_word([row[start + each] for each in order]) for start in range(0, len(row), 8)]
        for row in codes
    ]
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def _turned(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix)]


def gptq(codes: Matrix, zeros: Matrix, scales: torch.Tensor, less: int = 1) -> dict[str, Any]:
    """Of codes [out, in], zeros and scales [out, groups]."""
    stored = [[zero - less for zero in row] for row in _turned(zeros)]
    return {
        "qweight": _words(codes).T.contiguous(),
        "qzeros": _words(stored),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(len(codes[0]), dtype=torch.int32) // GROUP,
    }


def gptq_v2(codes: Matrix, zeros: Matrix, scales: torch.Tensor) -> dict[str, Any]:
    """The same, whose zeros are stored as they are."""
    return gptq(codes, zeros, scales, less=0)


def awq(codes: Matrix, zeros: Matrix, scales: torch.Tensor) -> dict[str, Any]:
    return {
        "qweight": _words(_turned(codes), AWQ_ORDER),
        "qzeros": _words(_turned(zeros), AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }


def compressed(codes: Matrix, zeros: Matrix, scales: torch.Tensor) -> dict[str, Any]:
    return {
        "weight_packed": _words(codes),
        "weight_zero_point": _words(_turned(zeros)).T.contiguous(),
        "weight_scale": scales,
        "weight_shape": torch.tensor([len(codes), len(codes[0])]),
    }


def compressed_symmetric(codes: Matrix, zeros: Matrix, scales: torch.Tensor) -> dict[str, Any]:
    parts = compressed(codes, zeros, scales)
    del parts["weight_zero_point"]
    return parts


def _config_groups(symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "group_size": GROUP, "strategy": "group", "symmetric": symmetric}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}


_PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
FLOAT8 = {"fp8": "weight_scale_inv", "float-quantized": "weight_scale"}
"""Formats whose codes are floats, and what their scales are called."""
FORMATS: dict[str, tuple[Callable[..., dict[str, Any]] | None, dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "gptq_v2": (
        gptq_v2,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "checkpoint_format": "gptq_v2",
        },
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "compressed": (compressed, {**_PACKED, "config_groups": _config_groups(False)}),
    "fp8": (None, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "float-quantized": (
        None,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
        },
    ),
    "symmetric": (compressed_symmetric, {**_PACKED, "config_groups": _config_groups(True)}),
}


def _float8(
    key: str, values: torch.Tensor, part: str, dense: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The matrix in floats of 8 bits: with one scale, as it is a single block, or one an output."""
    scale = values.abs().max() / 400
    if part == "weight_scale":
        scale = values.abs().amax(1, keepdim=True) / 300
    floats = (values / scale).to(torch.float8_e4m3fn)
    dense[key] = floats.float() * scale
    blocks = scale.view(-1, 1)[:1].expand(*(-(-size // 128) for size in values.shape))
    module = key.removesuffix(".weight")
    stored = scale if part == "weight_scale" else blocks.contiguous()
    return {key: floats, f"{module}.{part}": stored}


def write_foreign(source: Path, target: Path, name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The model in `source` with random codes for the matrices of its layers.

    Returns what the tensors of the checkpoint stand for, in float32.
    """
    write, settings = FORMATS[name]
    draw, stored, dense = random.Random(seed), {}, {}
    for key, values in load_file(source / "model.safetensors").items():
        if ".layers." not in key or values.dim() < 2 or len(values) % 8:
            stored[key] = values.half()
            dense[key] = stored[key].float()
            continue
        if name in FLOAT8:
            stored |= _float8(key, values, FLOAT8[name], dense)
            continue
        outputs, inputs = values.shape
        groups = inputs // GROUP
        codes = [[draw.randrange(16) for _ in range(inputs)] for _ in range(outputs)]
        zeros = [[draw.randint(1, 15) for _ in range(groups)] for _ in range(outputs)]
        if name == "symmetric":
            zeros = [[8] * groups for _ in range(outputs)]
        scales = torch.rand(outputs, groups, generator=torch.Generator().manual_seed(len(key)))
        scales = (scales * 0.03 + 0.01).half()
        module = key.removesuffix(".weight")
        assert write is not None
        stored |= {f"{module}.{part}": t for part, t in write(codes, zeros, scales).items()}
        each = [zero for row in zeros for zero in row for _ in range(GROUP)]
        offsets = torch.tensor(codes) - torch.tensor(each).view(outputs, inputs)
        dense[key] = offsets * scales.float().repeat_interleave(GROUP, 1)
    target.mkdir(parents=True, exist_ok=True)
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": settings, "dtype": "float16"}
    (target / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(target)
    return dense
