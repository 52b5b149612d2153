"""Whether a model under its plan can ever serve a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexrun.errors import RequestError

if TYPE_CHECKING:
    from flexrun.request import Request


def check_request(
    request: Request, *, vocab_size: int, context_length: int, has_tokenizer: bool, fits: bool
) -> None:
    """Raise `RequestError` if not; `fits` says whether the KV cache has room for all its tokens."""
    prompt = request.prompt_token_ids
    if not prompt:
        raise RequestError("empty_prompt", "the prompt has no tokens")
    bad = next((t for t in prompt if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise RequestError(
            "bad_token_id", f"token id {bad} is outside the vocabulary of {vocab_size}"
        )
    if len(prompt) >= context_length:
        raise RequestError(
            "prompt_too_long",
            f"the prompt has {len(prompt)} tokens; with one to generate, the model's context "
            f"of {context_length} is exceeded",
        )
    if request.sampling_params.stop and not has_tokenizer:
        raise RequestError("no_tokenizer", "stop texts need the model's tokenizer")
    if not fits:
        raise RequestError(
            "kv_cache_too_small",
            f"{len(prompt)} tokens of prompt and up to {request.sampling_params.max_tokens} of "
            "completion do not fit into the KV cache",
            hint="lower max_tokens, or raise --device-memory, --host-memory or "
            "--disk-space (whichever the KV cache is on)",
        )
