"""Text to token ids and back, by the model's own tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from flexrun.errors import RequestError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class Tokenizer:
    """A transformers tokenizer behind the few calls that this project makes."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        """The transformers tokenizer itself."""

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Load from a checkpoint directory. Raises `UsageError` if there is none."""
        from transformers import AutoTokenizer  # seconds to import; errors before it come at once

        try:
            hf = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # depends on the format: OSError, ValueError, KeyError, ...
            raise UsageError(
                f"cannot load a tokenizer from {directory}: {_first_line(error)}",
                hint="the model needs its tokenizer files (tokenizer.json, tokenizer_config.json) "
                "beside it; without them only prompt_token_ids can be run",
            ) from error
        return cls(hf)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds by default."""
        try:
            return list(self.hf(text, verbose=False)["input_ids"])
        except (TypeError, UnicodeError) as error:  # half of a surrogate pair
            raise RequestError(
                "bad_request", f"the prompt is not valid text: {_first_line(error)}"
            ) from None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant's next message begins."""
        if self.hf.chat_template is None:
            raise RequestError(
                "chat_template",
                "the model has no chat template",
                hint="use an instruction-tuned model, or give the whole text as prompt",
            )
        try:
            return list(
                self.hf.apply_chat_template(
                    [dict(message) for message in messages],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                )
            )
        except Exception as error:  # templates raise what they like on roles they do not take
            raise RequestError(
                "chat_template", f"the chat template refuses the messages: {_first_line(error)}"
            ) from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids, exactly as generated (no clean-up of spaces)."""
        text: str = self.hf.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text


def end_token_ids(directory: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Tokens that end a sequence, by generation_config.json, config.json and the tokenizer."""
    config = _read_json(directory / "config.json")
    text_config = config.get("text_config")
    candidates = [
        _read_json(directory / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        text_config.get("eos_token_id") if isinstance(text_config, dict) else None,
        tokenizer.hf.eos_token_id if tokenizer else None,
    ]
    ids: set[int] = set()
    for value in candidates:
        ids.update(v for v in (value if isinstance(value, list) else [value]) if type(v) is int)
    return frozenset(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # generation_config.json is optional; loading reports a broken config.json
    return data if isinstance(data, dict) else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
