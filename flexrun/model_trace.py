"""What a forward pass without data tells of a model: its attention, and how it uses weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flexrun.errors import UnsupportedModelError, not_exact
from flexrun.paused_forward import PausedForward
from flexrun.skeleton import instantiate, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_TRACED_EXPERTS = "flexrun_shapes_only"
ALL_EXPERTS_FUNCTIONS.register(_TRACED_EXPERTS, lambda module, hidden, *_, **__: hidden.clone())
_QUESTIONS = {getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape")}
"""What may be asked of a weight in any storage."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one layer's attention reads and stores per token."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What was found."""

    attention: list[AttentionShape]
    """Per layer."""
    layers: list[str]
    """Names of the decoder layers."""
    products: frozenset[str]
    """Weights that are nothing but the matrix of their own `torch.nn.Linear`, by name."""


class _WeightUse(TorchFunctionMode):
    """Sees every operation that a weight takes part in."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in model.named_parameters()}
        self._running: torch.nn.Module | None = None
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.register_forward_pre_hook(lambda module, _: self._run(module))
                module.register_forward_hook(lambda *_: self._run(None))
        self._products: set[str] = set()
        self._others: set[str] = set()

    @property
    def only_products(self) -> frozenset[str]:
        return frozenset(self._products - self._others)

    def _run(self, module: torch.nn.Module | None) -> None:
        self._running = module

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        others = list(args)
        own = None if self._running is None else self._running.weight
        if func is torch.nn.functional.linear and len(args) > 1 and args[1] is own:
            self._products |= self._among([others.pop(1)])
        if func not in _QUESTIONS:
            self._others |= self._among([others, kwargs])
        return func(*args, **kwargs)

    def _among(self, values: Any) -> set[str]:
        return {self._names[id(each)] for each in tree_leaves(values) if id(each) in self._names}


def trace(config: PretrainedConfig, dtype: torch.dtype) -> Trace:
    """Run a forward pass on the meta device, with random experts left out.

    Raises `UnsupportedModelError` where attention does not go through the interface once per layer.
    """
    name = config.model_type
    calls: list[tuple[torch.nn.Module, AttentionShape]] = []

    def record(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Any) -> Any:
        calls.append((module, AttentionShape(q.shape[0], k.shape[0], k.shape[2], v.shape[2])))
        return q.new_empty(q.shape[1], q.shape[0], v.shape[2])

    try:
        with torch.device("meta"), torch.no_grad():
            module = instantiate(config, dtype, experts=_TRACED_EXPERTS)
            rows = torch.zeros(1, 2, dtype=torch.long)
            inputs = {"input_ids": rows, "position_ids": rows, "use_cache": False}
            inputs["logits_to_keep"] = torch.zeros(1, dtype=torch.long)
            used = _WeightUse(module)
            with used:
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
    return Trace([shape for _, shape in calls], [name for name, _ in layers], used.only_products)


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
