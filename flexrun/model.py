"""The model: built by transformers from its config, without weights, with our attention inside."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from flexrun.errors import UsageError, not_exact
from flexrun.model_trace import AttentionShape, trace
from flexrun.paused_forward import PausedForward, install_pauses
from flexrun.skeleton import one_line, skeleton
from offload.checkpoint import scheme_of

if TYPE_CHECKING:
    from pathlib import Path

_FORWARD_INPUTS = ("position_ids", "logits_to_keep")
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


@dataclass(slots=True)
class Model:
    """A model whose parameters are on the meta device and whose forward pass can pause."""

    module: PreTrainedModel
    layers: list[torch.nn.Module]
    embedding: torch.nn.Module
    head: torch.nn.Module
    attention: list[AttentionShape]
    """Per layer."""
    context_length: int
    vocab_size: int
    stored_dtypes: dict[str, torch.dtype]
    """Of each tensor of the state dict: it may be computed in a larger type."""
    products: frozenset[str]
    """Weights that rows are only multiplied with, by their own `torch.nn.Linear`."""

    @property
    def config(self) -> PretrainedConfig:
        return self.module.config

    def forward(
        self,
        attend: Any,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
    ) -> PausedForward:
        """A paused forward pass over packed rows (all [rows]); logits for `logit_rows` only."""
        inputs = {
            "input_ids": input_ids.unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
            "logits_to_keep": logit_rows,
            "use_cache": False,
        }
        return PausedForward(self.module, inputs, attend)


def load_config(directory: Path) -> PretrainedConfig:
    """The text model's config of a checkpoint directory. Raises `UsageError`."""
    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # every architecture checks its settings in its own way
        raise UsageError(
            f"cannot read the model config in {directory}: {one_line(error)}",
            hint="check config.json; a newer architecture needs a newer transformers",
        ) from error
    return config


def stored_type(directory: Path, config: PretrainedConfig) -> torch.dtype:
    """The type of the plain tensors of a checkpoint, by its config. Raises `CheckpointError`."""
    named = getattr(config.get_text_config(), "dtype", None)
    if named is None:
        scheme = scheme_of(directory, config)
        named = torch.float32 if scheme is None else getattr(torch, scheme.plain)
    assert isinstance(named, torch.dtype)
    return named


def build_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    stored: torch.dtype | None = None,
) -> Model:
    """Build the model with meta parameters and real buffers on `device`.

    It computes in `dtype`; its weights are `stored` in that type unless another one is given.
    Raises `UnsupportedModelError` when it cannot be run exactly; no weight is read.
    """
    refuse_known(config)
    found = trace(config, dtype)
    module = skeleton(config, dtype)
    as_stored = module if stored in (None, dtype) else skeleton(config, stored)
    stored_dtypes = {name: tensor.dtype for name, tensor in as_stored.state_dict().items()}
    _materialize_buffers(module, device)
    layers = [module.get_submodule(name) for name in found.layers]
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    if embedding is None or head is None:
        raise not_exact(config.model_type, "it has no token embedding or no output head")
    install_pauses([*layers, head])
    return Model(
        module=module,
        layers=layers,
        embedding=embedding,
        head=head,
        attention=found.attention,
        context_length=context_length(config),
        vocab_size=int(embedding.weight.shape[0]),
        stored_dtypes=stored_dtypes,
        products=found.products,
    )


def refuse_known(config: PretrainedConfig) -> None:
    """Raise `UnsupportedModelError` for properties that the config names and we do not run."""
    if (reason := _reason_to_refuse(config)) is not None:
        raise not_exact(config.model_type, reason)


def _reason_to_refuse(config: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, not decoder-only"
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return "transformers has no causal language model for this architecture"
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    text = config.get_text_config()
    if getattr(text, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "it uses ALiBi position biases"
    if getattr(model_class, "_is_stateful", False):
        return "it keeps recurrent or convolution state besides the KV cache"
    kinds = set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYER_TYPES
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}, whose state is not cached"
    if getattr(text, "num_kv_shared_layers", 0):
        return "some of its layers share another layer's KV cache"
    forward = inspect.signature(model_class.forward).parameters
    missing = [name for name in _FORWARD_INPUTS if name not in forward]
    if missing:
        return f"its forward pass does not take {' and '.join(missing)}"
    return None


def context_length(config: PretrainedConfig) -> int:
    """Most positions of a sequence."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    ropes: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "longrope":  # longer sequences use other frequencies
            limits.append(rope.get("original_max_position_embeddings"))
    return min((int(limit) for limit in limits if limit), default=2048)


def _materialize_buffers(module: PreTrainedModel, device: torch.device) -> None:
    """Give a model that was built on the meta device its real buffers.

    Rotary frequencies and the like are computed, not stored in checkpoints; transformers' own
    loading relies on `_init_weights` to fill them, and so do we. Meta parameters stay as they are.
    """
    for submodule in module.modules():
        buffers = {name: b for name, b in submodule._buffers.items() if b is not None}
        for name, buffer in buffers.items():
            submodule._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        if buffers:
            with torch.no_grad():
                module._init_weights(submodule)
        for name in buffers:
            submodule._buffers[name] = submodule._buffers[name].to(device)
