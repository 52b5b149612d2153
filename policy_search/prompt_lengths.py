"""Lengths of the requests in a prompt file, where no tokenizer is needed to tell them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from policy_search.errors import PolicyError
from policy_search.workload import Lengths

if TYPE_CHECKING:
    from pathlib import Path

_MOST = 1_000_000


def lengths_of_token_ids(path: Path, gen_len: int) -> list[Lengths]:
    """Of a JSONL file of requests with prompt_token_ids; each of `n` completions counts as one.

    A completion has `max_tokens` tokens, or `gen_len` where there are none. Raises `PolicyError`.
    """
    found: list[Lengths] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found += _lengths(f"line {number} of {path}", line, gen_len)
    except OSError as error:
        raise PolicyError(f"cannot read the input {path}: {error.strerror or error}") from None
    if not found:
        raise PolicyError(f"the input {path} has no request")
    return found


def _lengths(where: str, line: bytes, gen_len: int) -> list[Lengths]:
    try:
        data: Any = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{where} is not JSON: {error}") from None
    prompt = data.get("prompt_token_ids") if isinstance(data, dict) else None
    if not isinstance(prompt, list) or not prompt:
        raise PolicyError(
            f"{where} has no prompt_token_ids, so its length is not known without a tokenizer",
            hint="tokenize the prompts first, or give a trace of lengths with --trace",
        )
    output, completions = data.get("max_tokens", gen_len), data.get("n", 1)
    for name, value in (("max_tokens", output), ("n", completions)):
        if type(value) is not int or not 1 <= value <= _MOST:
            raise PolicyError(f"{where}: {name} must be a whole number from 1 to {_MOST}")
    return [Lengths(len(prompt), output)] * completions
