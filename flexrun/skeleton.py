"""A model as transformers builds it from its config, with our attention, before it has weights."""

from __future__ import annotations

import copy
import inspect
import types

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexrun.errors import not_exact
from flexrun.paused_forward import IMPLEMENTATION, flexrun_attention

# No mask function is registered on purpose: transformers then builds no mask at all.
ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, flexrun_attention)


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, each tensor in the type that it has when loaded as `dtype`."""
    with torch.device("meta"):
        module = instantiate(config, dtype).eval()
    _keep_float32(module, dtype)
    return module


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


def instantiate(
    config: PretrainedConfig, dtype: torch.dtype, experts: str | None = None
) -> PreTrainedModel:
    """The model of `config` with our attention. Raises `UnsupportedModelError`."""
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


def one_line(error: Exception) -> str:
    """Kind and first line of an exception from code that is not ours."""
    text = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    return text if len(text) <= 200 else f"{text[:200]}..."
