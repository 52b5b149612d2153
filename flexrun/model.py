"""The model: built by transformers from its config, without weights, with our attention inside."""

from __future__ import annotations

import copy
import inspect
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexrun.errors import UnsupportedModelError, UsageError, not_exact
from flexrun.paused_forward import (
    IMPLEMENTATION,
    PausedForward,
    flexrun_attention,
    install_pauses,
)

if TYPE_CHECKING:
    from pathlib import Path

# No mask function is registered on purpose: transformers then builds no mask at all.
ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, flexrun_attention)
_TRACED_EXPERTS = "flexrun_shapes_only"
ALL_EXPERTS_FUNCTIONS.register(_TRACED_EXPERTS, lambda module, hidden, *_, **__: hidden.clone())

_FORWARD_INPUTS = ("position_ids", "logits_to_keep")
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one layer's attention reads and stores per token."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


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
    attention, layer_names = trace_attention(config, dtype)
    module = _skeleton(config, dtype)
    as_stored = module if stored in (None, dtype) else _skeleton(config, stored)
    stored_dtypes = {name: tensor.dtype for name, tensor in as_stored.state_dict().items()}
    _materialize_buffers(module, device)
    layers = [module.get_submodule(name) for name in layer_names]
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    if embedding is None or head is None:
        raise not_exact(config.model_type, "it has no token embedding or no output head")
    install_pauses([*layers, head])
    return Model(
        module=module,
        layers=layers,
        embedding=embedding,
        head=head,
        attention=attention,
        context_length=context_length(config),
        vocab_size=int(embedding.weight.shape[0]),
        stored_dtypes=stored_dtypes,
    )


def _skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, each tensor in the type that it has when loaded as `dtype`."""
    with torch.device("meta"):
        module = _instantiate(config, dtype).eval()
    _keep_float32(module, dtype)
    return module


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


def trace_attention(
    config: PretrainedConfig, dtype: torch.dtype
) -> tuple[list[AttentionShape], list[str]]:
    """Shapes of every layer's attention and the layers' names, from a forward pass without data.

    Raises `UnsupportedModelError` where attention does not go through the interface once per layer.
    """
    name = config.model_type
    calls: list[tuple[torch.nn.Module, AttentionShape]] = []

    def record(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Any) -> Any:
        calls.append((module, AttentionShape(q.shape[0], k.shape[0], k.shape[2], v.shape[2])))
        return q.new_empty(q.shape[1], q.shape[0], v.shape[2])

    try:
        with torch.device("meta"), torch.no_grad():
            module = _instantiate(config, dtype, experts=_TRACED_EXPERTS)
            rows = torch.zeros(1, 2, dtype=torch.long)
            inputs = {"input_ids": rows, "position_ids": rows, "use_cache": False}
            inputs["logits_to_keep"] = torch.zeros(1, dtype=torch.long)
            PausedForward(module.eval(), inputs, record).resume()
    except UnsupportedModelError:
        raise
    except Exception as error:  # model code: any failure means that we cannot follow it
        reason = f"its forward pass cannot be followed without weights ({one_line(error)})"
        raise not_exact(name, reason) from error
    layers = _decoder_layers(module, config, {attention_module for attention_module, _ in calls})
    owners = []
    for attention_module, _ in calls:
        owners += [i for i, (_, layer) in enumerate(layers) if attention_module in layer.modules()]
    if owners != list(range(len(layers))) or not layers:
        missing = sorted(set(range(len(layers))) - set(owners))
        what = (
            f"layers {missing[:4]} do not go through transformers' attention interface"
            if missing or not calls
            else "a layer attends more than once"
        )
        raise not_exact(name, what)
    return [shape for _, shape in calls], [layer_name for layer_name, _ in layers]


def _decoder_layers(
    module: PreTrainedModel, config: PretrainedConfig, attending: set[torch.nn.Module]
) -> list[tuple[str, torch.nn.Module]]:
    """Names and modules of the layers; not those of an image encoder, none of which attended."""
    count = config.get_text_config().num_hidden_layers
    for name, candidate in module.named_modules():
        if isinstance(candidate, torch.nn.ModuleList) and len(candidate) == count:
            if attending and attending.isdisjoint(candidate.modules()):
                continue
            return [(f"{name}.{i}", layer) for i, layer in enumerate(candidate)]
    return []


def _instantiate(
    config: PretrainedConfig, dtype: torch.dtype, experts: str | None = None
) -> PreTrainedModel:
    # Two models that share a config object would share its attention implementation.
    config = copy.deepcopy(config)
    extra = {} if experts is None else {"experts_implementation": experts}
    try:
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=IMPLEMENTATION, **extra
        )
    except (ValueError, KeyError, ImportError) as error:
        reason = "its attention does not go through transformers' attention interface"
        if IMPLEMENTATION not in str(error):
            reason = f"it cannot be built without weights ({one_line(error)})"
        raise not_exact(config.model_type, reason) from error
    model.requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    _fix_rotary_frequencies(model)
    return model


def _fix_rotary_frequencies(model: PreTrainedModel) -> None:
    """Keep the rotary frequencies of short sequences for good.

    For some kinds transformers recomputes them from the longest sequence of each forward pass, so
    that results depend on what else is in the batch. `context_length` keeps all sequences short.
    """
    for module in model.modules():
        kinds = str(getattr(module, "rope_type", ""))
        if "dynamic" in kinds or "longrope" in kinds:
            plain = inspect.unwrap(type(module).forward)
            module.forward = types.MethodType(plain, module)


def context_length(config: PretrainedConfig) -> int:
    """Most positions of a sequence."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    ropes: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "longrope":  # longer sequences use other frequencies
            limits.append(rope.get("original_max_position_embeddings"))
    return min((int(limit) for limit in limits if limit), default=2048)


def one_line(error: Exception) -> str:
    """Kind and first line of an exception from code that is not ours."""
    text = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    return text if len(text) <= 200 else f"{text[:200]}..."


def _keep_float32(module: PreTrainedModel, dtype: torch.dtype) -> None:
    """Declare as float32 what the architecture never computes in a smaller type."""
    plan = module._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, _, _ = build_glob_alternation(list(plan))
    for prefix, submodule in module.named_modules():
        for tensors in (submodule._parameters, submodule._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                if pattern.search(f"{prefix}.{name}"):
                    tensor.data = tensor.data.float()


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
