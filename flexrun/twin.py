"""A small random model of the same architecture, to compare two ways of running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from flexrun.twin_config import twin_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_WEIGHT_GAIN = 1.5
_NUDGE = 0.2
_MOST_WEIGHTS = 50_000_000
"""A twin has far fewer, unless it is of a kind whose sizes are not known here."""


def random_twin(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """The twin of `config` (see `twin_config`) with random weights: eager float32 on the CPU.

    The weights are large, so that greedy choices are clear, and nothing is left at zero or one:
    a bias, norm, attention sink or layer that is handled wrongly changes the tokens.
    """
    small = twin_config(config)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(small).parameters()
        size = sum(parameter.numel() for parameter in shapes)
    if size > _MOST_WEIGHTS:
        raise ValueError(f"it would have {size} weights, more than {_MOST_WEIGHTS}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            small, attn_implementation="eager", dtype=torch.float32
        )
        _randomize(model)
    return model.eval()


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    embedding = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter += _NUDGE * torch.randn_like(parameter)
        else:
            # Embeddings stay smaller than what layers add: else a tied head repeats its input.
            gain = 1.0 if parameter is embedding else _WEIGHT_GAIN
            parameter.normal_().mul_(gain / parameter.shape[-1] ** 0.5)
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer += _NUDGE * torch.randn_like(buffer)
