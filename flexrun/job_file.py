"""The job: a JSONL file with one request per line, checked line by line.

    {"prompt": "Once upon a time"}
    {"id": "b", "prompt_token_ids": [1, 2, 3], "max_tokens": 5}
    {"id": 3, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.7}

A bad line is one failed request; it never stops the job. The file is read twice and never held
in memory: once to check and count it before the model is loaded, once to run it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from flexrun.errors import RequestError, UsageError
from flexrun.request import Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flexrun.tokenizer import Tokenizer

PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")
SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))
_KNOWN_FIELDS = ("id", *PROMPT_FIELDS, *SAMPLING_FIELDS)
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class JobLine:
    """One line of the job: either runnable or with the error that makes it fail."""

    index: int
    """Line number, from 0; blank lines count."""
    request_id: str | int
    prompt: str | tuple[int, ...] | list[dict[str, Any]] = ""
    """Text, token ids or messages."""
    sampling_params: SamplingParams | None = None
    error: RequestError | None = None

    def to_request(self, tokenizer: Tokenizer | None) -> Request:
        """Tokenize the prompt. Raises `RequestError`."""
        if self.error is not None:
            raise self.error
        assert self.sampling_params is not None
        token_ids = token_ids_of(self.prompt, tokenizer)
        text = self.prompt if isinstance(self.prompt, str) else None
        return Request(self.index, self.request_id, text, token_ids, self.sampling_params)

    def failed(self, error: RequestError) -> RequestOutput:
        """The result of this line when `error` keeps it from running."""
        message = error.message if error.hint is None else f"{error.message} ({error.hint})"
        cause = {"code": error.code, "message": message}
        return RequestOutput(self.request_id, None, (), index=self.index, error=cause)


def token_ids_of(
    prompt: str | tuple[int, ...] | list[dict[str, Any]], tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Token ids of text, messages or token ids. Raises `RequestError`."""
    if isinstance(prompt, tuple):
        token_ids = prompt
    elif tokenizer is None:
        raise RequestError("no_tokenizer", "the model has no tokenizer: give prompt_token_ids")
    elif isinstance(prompt, str):
        token_ids = tuple(tokenizer.encode(prompt)) if prompt else ()
    else:
        token_ids = tuple(tokenizer.encode_chat(prompt)) if prompt else ()
    if not token_ids:
        raise RequestError("empty_prompt", "the prompt is empty: there is nothing to continue")
    return token_ids


class JobFile:
    """An input file and the sampling parameters that its lines may override."""

    def __init__(self, path: Path, defaults: SamplingParams) -> None:
        """Read the file once. Raises `UsageError` if it cannot be read or has no request."""
        self.path = path
        self.defaults = defaults
        self._file = _open(path)
        self.num_requests = 0
        self.needs_tokenizer = False
        self.sha256 = ""
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[JobLine]:
        return self._lines(lambda raw: None)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _check(self) -> None:
        digest = hashlib.sha256()
        for line in self._lines(digest.update):
            self.num_requests += 1
            if line.error is None and not isinstance(line.prompt, tuple):
                self.needs_tokenizer = True
        self.sha256 = digest.hexdigest()
        if self.num_requests == 0:
            raise UsageError(
                f"the input {self.path} has no request",
                hint='each line is one JSON object such as {"prompt": "Once upon a time"}',
            )

    def _lines(self, on_bytes: Callable[[bytes], object]) -> Iterator[JobLine]:
        seen: set[str] = set()
        self._file.seek(0)
        for index, raw in enumerate(self._raw_lines()):
            on_bytes(raw)
            raw = raw.removeprefix(_BOM) if index == 0 else raw
            if raw.strip():
                line = parse_line(raw, index, self.defaults)
                if str(line.request_id) in seen:
                    line = _duplicate(line)
                seen.add(str(line.request_id))
                yield line

    def _raw_lines(self) -> Iterator[bytes]:
        try:
            # Not from the file itself: leaving this generator early would close it.
            yield from iter(self._file.readline, b"")
        except OSError as error:
            raise UsageError(f"cannot read the input {self.path}: {error.strerror}") from None


def _open(path: Path) -> BinaryIO:
    try:
        file = open(path, "rb")  # noqa: SIM115 - read again while the job runs
    except OSError as error:
        raise UsageError(f"cannot read the input {path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UsageError(
            f"the input {path} is not a regular file", hint="it is read twice, so save it first"
        )
    return file


def parse_line(raw: bytes, index: int, defaults: SamplingParams) -> JobLine:
    """Check one line of the job; what is wrong with it is in the result's `error`."""
    request_id: str | int = str(index)
    try:
        data = _parse_json(raw)
        if "id" in data:
            request_id = _checked_id(data["id"])
        unknown = sorted(data.keys() - set(_KNOWN_FIELDS))
        if unknown:
            raise RequestError(
                "bad_request",
                f"unknown field {unknown[0]!r}",
                hint=f"known: {', '.join(_KNOWN_FIELDS)}",
            )
        prompt = _checked_prompt(data)
        params = replace(defaults, **{k: v for k, v in data.items() if k in SAMPLING_FIELDS})
    except UsageError as error:
        return JobLine(index, request_id, error=RequestError("bad_request", error.message))
    except RequestError as error:
        return JobLine(index, request_id, error=error)
    return JobLine(index, request_id, prompt, params)


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        data: Any = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError("bad_json", f"the line is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError("bad_json", f"the line is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise RequestError("bad_json", "the line is not a JSON object")
    return data


def _checked_id(value: Any) -> str | int:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RequestError("bad_request", f"id must be a string or a whole number, not {value!r}")
    _check_text("id", str(value))
    return value


def _checked_prompt(data: dict[str, Any]) -> str | tuple[int, ...] | list[dict[str, Any]]:
    given = [name for name in PROMPT_FIELDS if name in data]
    if len(given) != 1:
        raise RequestError(
            "bad_request", f"a request has exactly one of {', '.join(PROMPT_FIELDS)}"
        )
    value = data[given[0]]
    if given[0] == "prompt":
        if not isinstance(value, str):
            raise RequestError("bad_request", "prompt must be a string")
        _check_text("prompt", value)
    elif given[0] == "messages":
        value = checked_messages(value)
    else:
        value = checked_token_ids(value)
    if not value:
        raise RequestError("empty_prompt", f"{given[0]} is empty: there is nothing to continue")
    return value


def checked_token_ids(value: Any) -> tuple[int, ...]:
    """Token ids as a tuple. Raises `RequestError` if they are anything else."""
    good = isinstance(value, (list, tuple)) and all(type(t) is int and t >= 0 for t in value)
    if not good:
        raise RequestError(
            "bad_request", "prompt_token_ids must be a list of whole numbers of at least 0"
        )
    return tuple(value)


def checked_messages(value: Any) -> list[dict[str, Any]]:
    """A conversation. Raises `RequestError` unless each message has a role and a text."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(m, dict) for m in value):
        raise RequestError("bad_request", "messages must be a list of objects")
    for message in value:
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise RequestError("bad_request", f"every message needs {name}, a string")
            _check_text(name, message[name])
    return list(value)


def _check_text(name: str, text: str) -> None:
    # JSON can spell half of a surrogate pair, which no UTF-8 file and no tokenizer can hold.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError("bad_request", f"{name} has half of a surrogate pair: it is not text")


def _duplicate(line: JobLine) -> JobLine:
    error = RequestError("duplicate_id", f"the id {line.request_id!r} was used by an earlier line")
    return JobLine(line.index, line.request_id, error=error)
