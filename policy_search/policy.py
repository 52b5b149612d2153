"""The policy: one frozen plan of what lives where and how large the batch is."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from compression.selection import KV_BITS, PLAIN_BITS, WEIGHT_BITS, Quantization
from compression.spec import GROUPS
from offload.errors import CapacityError
from offload.tiers import Split
from policy_search.errors import PolicyError

_COUNTS = (
    "micro_batch_rows",
    "num_micro_batches",
    "max_rows",
    "max_sequences",
    "page_tokens",
    "prefetch_depth",
)

CHOICES: dict[str, tuple[str, ...] | tuple[int, ...]] = {
    "attention": ("auto", "host", "device"),
    "scheduler": ("continuous", "phased", "static"),
    "order": ("longest", "input"),
    "speculation": ("lookup", "off"),
    "preemption": ("auto", "swap", "recompute"),
    "weight_bits": WEIGHT_BITS,
    "head_bits": WEIGHT_BITS,
    "kv_bits": KV_BITS,
    "group_size": GROUPS,
}
"""What the fields may be that are one of a few words or numbers."""
QUANTIZATION = ("weight_bits", "head_bits", "kv_bits", "group_size", "keep")
"""The fields that change results."""
_TYPES: dict[str, tuple[type, str]] = {
    "overlap": (bool, "true or false"),
    "keep": (str, "a regular expression"),
}
MOST_GUESSED_LOGITS = 128
"""Rows of a sweep that give logits, if only that many sequences run that some are of guesses."""
DEFAULT_DEPTH = 3
"""A layer that computes and two on their way: one may be late without stopping compute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Where weights and KV cache live, the shape of a sweep, and how it is executed."""

    weights: Split = Split(device=100)
    """Percent of the weight bytes on each tier."""
    kv_cache: Split = Split(device=100)
    """Percent of the KV cache pages on each tier."""
    activations: Split = Split(device=100)
    """Percent of the waiting micro-batches' activations on each tier (DEVICE and HOST)."""
    micro_batch_rows: int = 512
    """Most rows (token positions) computed in one layer call; bounds the activation memory."""
    num_micro_batches: int | None = None
    """Cut every sweep into this many micro-batches where it has the rows; None: as few as fit."""
    max_rows: int = 2048
    """Most rows of one sweep, over all its micro-batches."""
    max_sequences: int = 256
    """Most sequences that are running at the same time."""
    page_tokens: int = 32
    """Token positions in one KV page."""
    prefetch_depth: int | None = None
    """Layers whose streamed weights are in working memory or on their way; None: 3, or 2 where the
    device's memory does not suffice."""
    attention: str = "auto"
    """Where rows of running sequences attend to pages on HOST: there, or on the device, to which
    the pages move; auto splits them so that link and processor take as long."""
    scheduler: str = "continuous"
    """How sweeps are filled: prompts ride in the sweeps of sequences that generate; one phase at a
    time; or FlexGen's static block, which is over before the next one begins."""
    order: str = "longest"
    """Of sequences that wait: the most tokens to generate first, or as they come."""
    speculation: str = "lookup"
    """Guess the next tokens from what followed the same ones earlier, and compute their rows in the
    same sweep where they cost nothing. Tokens are the same without."""
    preemption: str = "auto"
    """What a sequence that has to give its KV pages away had computed moves to a slower tier, or is
    computed again; auto takes what is faster."""
    overlap: bool = True
    """Transfers run beside compute; False runs the same steps one after another."""
    weight_bits: int = PLAIN_BITS
    """Of the large matrices of decoder layers: fewer than 16 are quantized in groups."""
    head_bits: int = PLAIN_BITS
    """Of the output head and the embedding table."""
    kv_bits: int = PLAIN_BITS
    """Of keys and values in full pages; a sequence's first one stays as it is computed."""
    group_size: int = 64
    """Neighbours of a quantized matrix, key or value that share a scale."""
    keep: str = ""
    """A regular expression: tensors in whose names it is found are not quantized."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PolicyError(f"{name} must be at least 1, not {value}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices or type(value) is not type(choices[0]):
                raise PolicyError(f"{name} must be one of {', '.join(map(str, choices))}")
        try:
            re.compile(self.keep)
        except re.error as error:
            raise PolicyError(f"keep is not a regular expression: {error}") from None
        if self.activations.disk:
            raise PolicyError(
                "activations cannot live on disk", hint="use --activations device=A,host=B"
            )

    def with_batch(self, **given: int | None) -> Policy:
        """This policy with the fields replaced that are not None. Raises `PolicyError`.

        Unless `max_rows` is given, a larger `micro_batch_rows` enlarges the sweep, so that it still
        has several micro-batches to use a layer's weights for.
        """
        values: dict[str, Any] = {name: n for name, n in given.items() if n is not None}
        changed = replace(self, **values)
        if "micro_batch_rows" not in values or "max_rows" in values:
            return changed
        enough = changed.micro_batch_rows * (changed.num_micro_batches or 4)
        return replace(changed, max_rows=max(changed.max_rows, enough))

    @property
    def quantization(self) -> Quantization:
        """What is quantized, and how."""
        return Quantization(
            weight_bits=self.weight_bits,
            head_bits=self.head_bits,
            group=self.group_size,
            keep=self.keep,
            kv_bits=self.kv_bits,
        )

    @property
    def depth(self) -> int:
        """The prefetch depth that plans are made with."""
        return self.prefetch_depth or DEFAULT_DEPTH

    @property
    def pages_on_device(self) -> bool:
        """Whether nothing but weights is offloaded."""
        return self.kv_cache.device == self.activations.device == 100

    @property
    def all_on_device(self) -> bool:
        """Whether nothing is offloaded."""
        return self.weights.device == 100 and self.pages_on_device

    @property
    def logit_rows(self) -> int:
        """Most rows of a micro-batch that give logits: guessed tokens do, too."""
        most = self.max_sequences
        if self.speculation != "off":
            most = max(most, min(MOST_GUESSED_LOGITS, 4 * most))
        return min(self.micro_batch_rows, most)

    @property
    def gathered_tokens(self) -> int:
        """Positions whose keys and values attention copies together, unless one sequence has more.

        In proportion to the rows of a micro-batch, so that a small device gets a small workspace.
        """
        return 32 * self.micro_batch_rows

    def to_json(self) -> str:
        """The policy as one JSON object, with splits written like on the command line."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: str(v) if isinstance(v, Split) else v for k, v in values.items()}
        return json.dumps(plain, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Read `to_json`'s format. Raises `PolicyError` on unknown fields or wrong types."""
        try:
            data: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise PolicyError(f"the policy is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise PolicyError("a policy is one JSON object")
        inner = data.get("policy", data)  # a report has the policy as one of its parts
        if not isinstance(inner, dict):
            raise PolicyError("a policy is one JSON object")
        known = sorted(field.name for field in fields(cls))
        for name in inner:
            if name not in known:
                raise PolicyError(
                    f"unknown policy field {name!r}", hint=f"known: {', '.join(known)}"
                )
        return cls(**{name: _checked(name, value) for name, value in inner.items()})

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read a policy file. Raises `PolicyError`."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"cannot read the policy {path}: {error}") from None


def with_half_the_rows(policy: Policy, shortage: str) -> Policy:
    """For a device that had no memory for more. Raises `CapacityError` with the `shortage`."""
    if policy.micro_batch_rows == 1:
        raise CapacityError(
            f"{shortage}: not even for one row", hint="lower --device-memory, so that less is kept"
        )
    rows = policy.micro_batch_rows // 2
    return replace(policy, micro_batch_rows=rows, max_rows=max(rows, policy.max_rows // 2))


def _checked(name: str, value: Any) -> Any:
    if name in ("weights", "kv_cache", "activations"):
        if not isinstance(value, str):
            raise PolicyError(f'policy field {name} must be a split such as "device=20,host=80"')
        return Split.parse(value)
    if name in CHOICES:
        if value not in CHOICES[name] or type(value) is not type(CHOICES[name][0]):
            choices = ", ".join(map(str, CHOICES[name]))
            raise PolicyError(f"policy field {name} must be one of {choices}")
        return value
    if name in _TYPES:
        kind, what = _TYPES[name]
        if not isinstance(value, kind):
            raise PolicyError(f"policy field {name} must be {what}")
        return value
    if value is None and name in ("num_micro_batches", "prefetch_depth"):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PolicyError(
            f"policy field {name} must be a whole number of at least 1, not {value!r}"
        )
    return value
