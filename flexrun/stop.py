"""When one completion ends, and its text: end tokens, stop tokens, stop texts and the length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexrun.errors import RequestError
from flexrun.request import CompletionOutput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexrun.request import SamplingParams
    from flexrun.tokenizer import Tokenizer

_CONTEXT = 5  # prompt tokens decoded along, so that a leading space is kept
_MOST_PENDING = 8  # tokens; a UTF-8 character has at most 4 bytes, so the rest is not UTF-8 at all
_INCOMPLETE = "�"  # what a decoder writes for bytes that are no character (yet)


class StopChecker:
    """The tokens of one completion so far and whether, and why, it has ended.

    Text is decoded along the way only if there are stop texts to look for.
    """

    def __init__(
        self,
        params: SamplingParams,
        end_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int] = (),
        max_tokens: int | None = None,
    ) -> None:
        """`max_tokens` is the request's own limit, or less where the context ends before it."""
        if params.stop and tokenizer is None:
            raise RequestError("no_tokenizer", "stop texts need the model's tokenizer")
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._params = params
        self._end_ids = frozenset() if params.ignore_eos else end_token_ids
        self._max_tokens = params.max_tokens if max_tokens is None else max_tokens
        self._tokenizer = tokenizer
        self._context = tuple(prompt_token_ids[-_CONTEXT:])
        self._cut_text: str | None = None
        self._decoder = None
        if tokenizer is not None and params.stop:
            self._decoder = _IncrementalDecoder(tokenizer, self._context, params)

    def banned(self, ahead: int = 0) -> tuple[int, ...]:
        """Tokens that the next one, or one further `ahead`, may not be: `min_tokens` come first."""
        if len(self.token_ids) + ahead >= self._params.min_tokens:
            return ()
        return tuple(sorted(self._end_ids.union(self._params.stop_token_ids)))

    def append(self, token: int) -> bool:
        """Take the next token; returns whether the completion has ended with it."""
        self.token_ids.append(token)
        self._check_text()
        if token in self._end_ids:
            self.finish_reason = "stop"
        elif token in self._params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token
        elif self._cut_text is not None:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def output(self, index: int) -> CompletionOutput:
        """The completion as users get it: every token, the text without what ended it."""
        return CompletionOutput(
            index, self._text(), tuple(self.token_ids), self.finish_reason, self.stop_reason
        )

    def _check_text(self) -> None:
        if self._decoder is None:
            return
        seen, text = self._decoder.append(self.token_ids[-1])
        if len(self.token_ids) < self._params.min_tokens:
            return
        stops = self._params.stop
        # A stop text that ends in the new part may begin this far before it.
        start = max(0, seen - max(map(len, stops)) + 1)
        found = [(text.find(stop, start), stop) for stop in stops]
        found = [(position, stop) for position, stop in found if position >= 0]
        if found:
            position, self.stop_reason = min(found, key=lambda pair: pair[0])
            self._cut_text = text[:position]

    def _text(self) -> str:
        if self._cut_text is not None:
            return self._cut_text
        if self._tokenizer is None:
            return ""
        ended_by_token = self.finish_reason == "stop"
        ids = self.token_ids[:-1] if ended_by_token else self.token_ids
        skip = self._params.skip_special_tokens
        before = self._tokenizer.decode(self._context, skip)
        full = self._tokenizer.decode([*self._context, *ids], skip)
        return full[_common_length(before, full) :]


class _IncrementalDecoder:
    """Text of a growing token list, decoding only the last few tokens each time.

    A token's text depends on its neighbours (spaces, characters cut in two), so each new piece is
    the difference between decoding a short window without and with the new tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: tuple[int, ...], params: SamplingParams
    ) -> None:
        self._decode = tokenizer.decode
        self._skip_special = params.skip_special_tokens
        self._window = list(context)  # tokens read before, then those whose text is not final
        self._read = len(context)
        self._text = ""

    def append(self, token: int) -> tuple[int, str]:
        """Returns the characters that were final before this token, and the text up to now."""
        self._window.append(token)
        before = self._decode(self._window[: self._read], self._skip_special)
        after = self._decode(self._window, self._skip_special)
        seen = len(self._text)
        text = self._text + after[_common_length(before, after) :]
        pending = len(self._window) - self._read
        if not after.endswith(_INCOMPLETE) or pending > _MOST_PENDING:
            self._text = text
            self._window = self._window[-max(pending, _CONTEXT) :]
            self._read = len(self._window)
        return seen, text.rstrip(_INCOMPLETE)


def _common_length(before: str, after: str) -> int:
    """Length of what both begin with: all of `before`, unless it ended within a character."""
    if after.startswith(before):
        return len(before)
    pairs = zip(before, after)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
