"""A forward pass as a coroutine: it stops before every decoder layer and before the output head.

Each micro-batch's `model.forward` runs in a greenlet of its own. Pre-hooks on the layers switch
back to the driver, so the zig-zag order is nothing but the order in which the driver resumes
greenlets, and everything around the layers stays in the model's own code. All greenlets share the
thread's state (gradient mode, CUDA stream): the driver sets it once, and no switch happens inside a
`with` that changes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import greenlet
import torch

from flexrun.errors import not_exact

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMPLEMENTATION = "flexrun"
"""Name our attention is registered under with transformers' attention interface."""
_IGNORED_TENSORS = {"position_ids", "logits_to_keep"}
"""The model's own inputs, which many hand down to attention together with other arguments."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What one attention call asks for besides queries, keys and values."""

    scaling: float
    sliding_window: int | None = None
    """A query sees this many positions, its own included; None: all before it."""
    chunk: int | None = None
    """A query sees positions of its own chunk of this many only; None: no chunks."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    sinks: torch.Tensor | None = None
    """[query_heads]: one logit per head that takes probability and gives nothing."""


class PausedForward(greenlet.greenlet):  # type: ignore[misc]  # greenlet has no annotations
    """One micro-batch's forward pass.

    `attend(module, query, key, value, options)` gets [heads, rows, head_dim] tensors and returns
    [rows, query_heads, value_dim].
    """

    def __init__(
        self, model: Callable[..., Any], inputs: dict[str, Any], attend: Callable[..., Any]
    ):
        super().__init__(lambda: model(**inputs))
        self.attend = attend
        self.hidden: torch.Tensor | None = None
        """What the unit that runs next takes: all that the pass holds of its rows."""
        self.unit = -1
        """The layer, or the head after the last one, that runs when it is resumed next."""

    def pause(self) -> None:
        """From inside: stop here until it is resumed."""
        assert self.parent is not None
        self.parent.switch()

    def resume(self) -> Any:
        """Run up to the next pause; the model's output once it is through."""
        return self.switch()


def install_pauses(stops: Sequence[torch.nn.Module]) -> None:
    """Make every `PausedForward` stop before each of `stops`, which run in this order."""
    for unit, module in enumerate(stops):
        module.register_forward_pre_hook(_pause_before(unit), with_kwargs=True)


def _pause_before(unit: int) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        current = greenlet.getcurrent()
        if isinstance(current, PausedForward):
            current.unit = unit
            current.hidden = args[0] if args else kwargs.get("hidden_states")
            current.pause()

    return hook


def flexrun_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: packed [1, heads, rows, head_dim] of one micro-batch.

    Raises `UnsupportedModelError` for what it would have to obey and does not know.
    """
    current = greenlet.getcurrent()
    assert isinstance(current, PausedForward), "this model runs inside an engine only"
    _refuse_unknown(module, attention_mask, others)
    options = AttentionOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        chunk=_chunk_size(module),
        softcap=softcap,
        sinks=s_aux,
    )
    output = current.attend(module, query[0], key[0], value[0], options)
    return output.unsqueeze(0), None


def _refuse_unknown(
    module: torch.nn.Module, mask: torch.Tensor | None, others: dict[str, Any]
) -> None:
    reason = None
    if mask is not None:
        reason = "it makes attention masks of its own"
    causal = others.get("is_causal")
    if (getattr(module, "is_causal", True) if causal is None else causal) is False:
        reason = "its tokens attend to later ones as well"
    for name, value in others.items():
        if isinstance(value, torch.Tensor) and name not in _IGNORED_TENSORS:
            reason = f"its attention also takes {name}"
    if reason is not None:
        config: Any = getattr(module, "config", None)
        raise not_exact(getattr(config, "model_type", "these"), reason)


def _chunk_size(module: torch.nn.Module) -> int | None:
    """Llama 4's chunked layers say so in the config alone, not in the attention call."""
    config: Any = getattr(module, "config", None)
    chunk: int | None = getattr(config, "attention_chunk_size", None)
    layer_types = getattr(config, "layer_types", None)
    index: Any = getattr(module, "layer_idx", None)
    if chunk is None or not layer_types or not isinstance(index, int):
        return None
    return chunk if layer_types[index] == "chunked_attention" else None
