"""The sizes that a checkpoint's config.json states, under one name each."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.errors import QuantizationError
from compression.prequantized import Prequantized, prequantized
from compression.selection import EXPERT_COUNTS
from compression.spec import BITS
from policy_search.errors import PolicyError
from policy_search.machine import computed_on_cpu

_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "max_position_embeddings": ("n_positions",),
}
_KEPT_IN_FLOAT32 = {
    "gpt_oss": (re.compile(r"norm[^.]*\.weight$"), ("float16",)),
    "deepseek_v2": (re.compile(r"mlp\.gate\.weight$"), ("float16", "bfloat16")),
    "deepseek_v3": (re.compile(r"mlp\.gate\.weight$"), ("float16", "bfloat16")),
}
"""Tensors that are float32 in the model of a family where the others have one of these types."""
DEFAULT_CONTEXT = 2048
"""What the engine, too, takes where the config states no context length."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The config of the text model in `directory`."""

    directory: Path
    settings: dict[str, Any]
    built_in: bool = False
    """Published sizes that need no files: `directory` is a name, and nothing is read from it."""

    @classmethod
    def load(cls, directory: Path) -> ModelConfig:
        """Read config.json. Raises `PolicyError`."""
        path = directory / "config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError("it is not a JSON object")
        except FileNotFoundError:
            raise PolicyError(
                f"there is no {path}",
                hint="--model is a local directory with config.json; a model of the hub has to be "
                "downloaded first (`hf download NAME --local-dir DIR`)",
            ) from None
        except (OSError, ValueError) as error:
            raise PolicyError(
                f"cannot read {path}: {error}", hint="download or copy the file again"
            ) from None
        try:
            if described := settings.get("quantization_config"):
                prequantized(described)
        except QuantizationError as error:
            raise PolicyError(f"{path}: {error.message}", error.hint) from None
        text = settings.get("text_config")
        return cls(directory, settings | text if isinstance(text, dict) else settings)

    @property
    def prequantized(self) -> Prequantized | None:
        """How the checkpoint's matrices are quantized, if they are."""
        described = self.settings.get("quantization_config")
        return prequantized(described) if described else None

    @property
    def model_type(self) -> str:
        """The architecture's name."""
        return str(self.settings.get("model_type", "unknown"))

    def optional(self, name: str) -> int | None:
        """The positive whole number under `name`, or None where the config has none."""
        for spelling in (name, *_OTHER_NAMES.get(name, ())):
            value = self.settings.get(spelling)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PolicyError(
                    f"{self.directory / 'config.json'}: {spelling} must be a positive whole "
                    f"number, not {value!r}",
                    hint="check the file; a size that differs from layer to layer is not supported",
                )
            return value
        return None

    def number(self, name: str) -> int:
        """Like `optional`. Raises `PolicyError` where the config has none."""
        value = self.optional(name)
        if value is None:
            raise PolicyError(
                f"{self.directory / 'config.json'} has no {name}, so the sizes of this "
                f"{self.model_type} model are not known",
                hint="check that --model is a decoder-only model of the transformers library "
                "(`flexrun check --model DIR`)",
            )
        return value

    def flag(self, name: str) -> bool:
        """Whether `name` is true."""
        return bool(self.settings.get(name))

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values in one layer.

        With multi-head latent attention (DeepSeek) transformers caches full keys and values of all
        heads, and so does the engine. A cache of latents would have `kv_lora_rank` +
        `qk_rope_head_dim` values of a token and layer instead, once for all heads (DeepSeek-V2's
        paper, section 2.1.3): of DeepSeek-V3 576 instead of 40 960.
        """
        if self.optional("kv_lora_rank"):
            return self.number("num_attention_heads")
        if self.flag("multi_query"):
            return 1
        return self.optional("num_key_value_heads") or self.number("num_attention_heads")

    @property
    def head_dim(self) -> int:
        """Values of one query head."""
        return self.optional("head_dim") or (
            self.number("hidden_size") // self.number("num_attention_heads")
        )

    @property
    def key_dim(self) -> int:
        """Values of one head's key, and of its query."""
        if self.optional("kv_lora_rank"):
            return self.number("qk_nope_head_dim") + self.number("qk_rope_head_dim")
        return self.head_dim

    @property
    def value_dim(self) -> int:
        """Values of one head's value."""
        return self.number("v_head_dim") if self.optional("kv_lora_rank") else self.head_dim

    @property
    def experts_per_row(self) -> int:
        """Experts that each row visits; 1 for a dense model."""
        return self.optional("num_experts_per_tok") or 1

    @property
    def experts(self) -> int:
        """Of a layer, of which each row visits some; 0 for a dense model."""
        return next((self.number(name) for name in EXPERT_COUNTS if self.flag(name)), 0)

    @property
    def context_length(self) -> int:
        """Most positions of one sequence."""
        return self.optional("max_position_embeddings") or DEFAULT_CONTEXT

    def type_of(self, name: str, dtype: str) -> str:
        """The type that the tensor `name` is stored in where others are stored as `dtype`."""
        kept = _KEPT_IN_FLOAT32.get(self.model_type)
        if kept is None or dtype not in kept[1]:
            return dtype
        return "float32" if kept[0].search(name) else dtype

    def types(self, requested: str, *, unified: bool) -> tuple[str, str]:
        """The types that weights are stored and computed in. Raises `PolicyError`."""
        unnamed = "float32" if self.prequantized is None else self.prequantized.plain
        stored = self.settings.get("dtype") or self.settings.get("torch_dtype") or unnamed
        stored = str(stored).removeprefix("torch.") if requested == "auto" else requested
        if stored not in BITS:
            raise PolicyError(
                f"{self.directory / 'config.json'} has the type {stored}, which is not supported",
                hint=f"set --dtype to one of {', '.join(BITS)}",
            )
        return stored, computed_on_cpu(stored) if unified else stored
