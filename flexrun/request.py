"""What a user asks for and gets back, under vLLM's names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from flexrun.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Raises `UsageError` on impossible values."""

    n: int = 1
    """Completions per prompt, at most 16384."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    seed: int | None = None
    """Random state; None derives one from the engine's seed and the request's index."""
    stop: tuple[str, ...] = ()
    """Texts that end the sequence; not part of the output."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the sequence, besides the model's own."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    max_tokens: int = 16
    """Most tokens to generate."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are not chosen before this many tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        stop: Any = self.stop
        stop = (stop,) if isinstance(stop, str) else stop
        object.__setattr__(self, "stop", _as_tuple("stop", stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name))
        _check_ranges(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


_INTEGERS = ("n", "top_k", "max_tokens", "min_tokens")
_NUMBERS = ("temperature", "top_p", "min_p")
_MOST_COMPLETIONS = 16384  # vLLM's limit; one line with n = 10**9 must not take the job's memory


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if value is not None and not isinstance(value, (list, tuple, set, frozenset)):
        raise UsageError(f"{name} must be a list, not {value!r}")
    return tuple(value or ())


def _check_type(name: str, value: Any) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if name in _INTEGERS and not is_int:
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    if name == "seed" and value is not None and not is_int:
        raise UsageError(f"seed must be a whole number or null, not {value!r}")
    if name in _NUMBERS and not (is_int or isinstance(value, float)):
        raise UsageError(f"{name} must be a number, not {value!r}")
    if name in _NUMBERS and not (is_int or math.isfinite(value)):
        raise UsageError(f"{name} must be finite, not {value!r}")
    if name in ("ignore_eos", "skip_special_tokens") and not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, not {value!r}")
    if name == "stop" and not all(isinstance(text, str) and text for text in value):
        raise UsageError(f"stop must be non-empty texts, not {value!r}")
    if name == "stop_token_ids" and not all(type(token) is int and token >= 0 for token in value):
        raise UsageError(f"stop_token_ids must be whole numbers of at least 0, not {value!r}")


def _check_ranges(params: SamplingParams) -> None:
    checks = [
        ("n", 1 <= params.n <= _MOST_COMPLETIONS, f"between 1 and {_MOST_COMPLETIONS}"),
        ("temperature", 0 <= params.temperature <= 1e30, "between 0 and 1e30"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("top_k", params.top_k >= -1, "-1, 0 or positive"),
        ("min_p", 0 <= params.min_p <= 1, "between 0 and 1"),
        ("max_tokens", params.max_tokens >= 1, "at least 1"),
        ("min_tokens", 0 <= params.min_tokens <= params.max_tokens, "between 0 and max_tokens"),
    ]
    for name, good, wanted in checks:
        if not good:
            raise UsageError(f"{name} must be {wanted}, not {getattr(params, name)!r}")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete; `index` is its place in the job (input line, from 0)."""

    index: int
    request_id: str | int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    ends_after: int | None = None
    """Generated tokens after which it ends, as if it then said so: for benchmarks, which have
    lengths that nobody knows before."""


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n completions."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    """`stop`, `length` or `error`."""
    stop_reason: str | int | None = None
    """The stop text or token id that ended it; None for end-of-sequence and length."""


@dataclass(slots=True)
class RequestOutput:
    """A finished request with all its completions."""

    request_id: str | int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    index: int = 0
    """The request's place in the job."""
    error: dict[str, str] | None = None
    """`{"code", "message"}` of a request that failed."""

    @classmethod
    def of(
        cls,
        request: Request,
        outputs: list[CompletionOutput] | None = None,
        error: dict[str, str] | None = None,
    ) -> RequestOutput:
        """Of a `request` that is over, with its completions or what went wrong."""
        known = request.request_id, request.prompt, request.prompt_token_ids
        return cls(*known, outputs or [], index=request.index, error=error)
