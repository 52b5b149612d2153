"""What a forward pass without data tells: which weights are nothing but matrices of products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from flexrun.model_trace import trace
from flexrun.skeleton import instantiate
from tests.tiny_models import tiny_llama_config


def linear_weights(config: PretrainedConfig) -> set[str]:
    with torch.device("meta"):
        module = instantiate(config, torch.float32)
    return {
        f"{name}.weight"
        for name, each in module.named_modules()
        if isinstance(each, torch.nn.Linear)
    }


def test_all_linears_of_a_llama() -> None:
    config = tiny_llama_config()
    assert trace(config, torch.float32).products == linear_weights(config)


def test_a_tied_table_is_looked_up_in_too() -> None:
    config = tiny_llama_config(tie_word_embeddings=True)
    assert trace(config, torch.float32).products == linear_weights(config) - {"lm_head.weight"}


@pytest.mark.parametrize("use", ["matmul", "transpose", "scaled", "borrowed"])
def test_other_uses_are_noticed(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that also takes a linear's matrix for something else."""
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaMLP.forward

    def forward(self: Any, rows: torch.Tensor) -> torch.Tensor:
        matrix = self.down_proj.weight
        assert matrix.dtype == rows.dtype  # a question, not a use
        if use == "matmul":
            return plain(self, rows) + rows @ (matrix @ matrix.T)
        if use == "borrowed":  # a product, but not one of the module's own forward
            up = torch.nn.functional.linear(rows, self.up_proj.weight)
            return torch.nn.functional.linear(up, matrix) + 0 * self.up_proj(rows).sum()
        if use == "transpose":
            return plain(self, rows) + rows @ (matrix.mT.T @ matrix.mT)
        return plain(self, rows) + torch.nn.functional.linear(rows, matrix @ (2 * matrix).T)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    config = tiny_llama_config()
    left = linear_weights(config) - trace(config, torch.float32).products
    if use == "borrowed":
        left -= {
            f"model.layers.{layer}.mlp.{up}_proj.weight"
            for layer in range(4)
            for up in ("up", "gate")
        }
    assert left == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4)}
