"""Facts about the input of a job: what a line may say, and what is wrong with bad ones."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack, closing

import pytest

from flexrun.errors import RequestError, UsageError
from flexrun.job_file import JobFile, parse_line
from flexrun.request import SamplingParams

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=7)


@pytest.fixture
def job_of(tmp_path):
    """Makes jobs of texts or bytes, and closes them after the test."""
    with ExitStack() as stack:

        def make(data: str | bytes) -> JobFile:
            path = tmp_path / "in.jsonl"
            path.write_bytes(data.encode() if isinstance(data, str) else data)
            return stack.enter_context(closing(JobFile(path, DEFAULTS)))

        yield make


def test_the_three_kinds_of_prompt():
    """A line has a text, token ids or messages, and may override the sampling parameters."""
    text = parse_line(b'{"prompt": "hi", "temperature": 1, "stop": ["x"], "n": 2}', 4, DEFAULTS)
    assert (text.index, text.request_id, text.prompt, text.error) == (4, "4", "hi", None)
    assert text.sampling_params == SamplingParams(temperature=1, stop=("x",), n=2, max_tokens=7)
    tokens = parse_line(b'{"prompt_token_ids": [1, 2], "id": "a"}', 0, DEFAULTS)
    assert (tokens.request_id, tokens.prompt) == ("a", (1, 2))
    messages = [{"role": "user", "content": "hi"}]
    chat = parse_line(json.dumps({"messages": messages, "id": 7}).encode(), 0, DEFAULTS)
    assert (chat.request_id, chat.prompt) == (7, messages)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("not json", "bad_json"),
        ('{"prompt": "cut', "bad_json"),
        ("[1, 2]", "bad_json"),
        ('"text"', "bad_json"),
        ("null", "bad_json"),
        ("[" * 100_000, "bad_json"),
        ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "bad_json"),
        (b'{"prompt": "\xff"}', "bad_json"),
        ("{}", "bad_request"),
        ('{"prompt": 5}', "bad_request"),
        ('{"prompt": null}', "bad_request"),
        ('{"prompt": "a", "messages": []}', "bad_request"),
        ('{"prompt": "a", "max_token": 5}', "bad_request"),
        ('{"prompt": "a", "max_tokens": "5"}', "bad_request"),
        ('{"prompt": "a", "max_tokens": 0}', "bad_request"),
        ('{"prompt": "a", "temperature": NaN}', "bad_request"),
        ('{"prompt": "a", "stop": 5}', "bad_request"),
        ('{"prompt": "a", "id": 1.5}', "bad_request"),
        ('{"prompt": "a", "id": true}', "bad_request"),
        ('{"prompt": "a", "id": null}', "bad_request"),
        ('{"prompt": "\\ud800"}', "bad_request"),
        ('{"prompt": "a", "id": "\\ud800"}', "bad_request"),
        ('{"prompt_token_ids": "12"}', "bad_request"),
        ('{"prompt_token_ids": [1.0]}', "bad_request"),
        ('{"prompt_token_ids": [-1]}', "bad_request"),
        ('{"prompt_token_ids": [true]}', "bad_request"),
        ('{"messages": "hi"}', "bad_request"),
        ('{"messages": ["hi"]}', "bad_request"),
        ('{"messages": [{"role": "user"}]}', "bad_request"),
        ('{"messages": [{"role": "user", "content": null}]}', "bad_request"),
        ('{"prompt": ""}', "empty_prompt"),
        ('{"prompt_token_ids": []}', "empty_prompt"),
        ('{"messages": []}', "empty_prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_line_has_an_error(line, code):
    """Whatever a line holds, it gives an error with a code, never an exception."""
    raw = line if isinstance(line, bytes) else line.encode()
    parsed = parse_line(raw, 3, DEFAULTS)
    assert parsed.error is not None
    assert parsed.error.code == code
    json.dumps(parsed.failed(parsed.error).error).encode()


def test_an_unknown_field_is_named():
    """The error of a misspelled field names it and the known ones."""
    error = parse_line(b'{"prompt": "a", "max_token": 5}', 0, DEFAULTS).error
    assert error is not None
    assert "'max_token'" in error.message
    assert "max_tokens" in str(error.hint)


def test_a_bad_line_does_not_stop_the_job(job_of):
    """Good and bad lines come in order; blank lines are skipped but count for the index."""
    job = job_of('{"prompt": "a"}\n\n  \nbroken\n{"prompt": "b"}')
    lines = list(job)
    assert [(line.index, line.error is None) for line in lines] == [
        (0, True),
        (3, False),
        (4, True),
    ]
    assert [line.index for line in job] == [0, 3, 4]
    assert job.num_requests == 3


def test_duplicate_ids_fail_but_for_the_first(job_of):
    """An id that an earlier line has, given or by default, is an error of the later line."""
    job = job_of('{"prompt": "a", "id": 2}\n{"prompt": "b", "id": "2"}\n{"prompt": "c"}\n')
    codes = [line.error and line.error.code for line in job]
    assert codes == [None, "duplicate_id", "duplicate_id"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_byte_order_mark_and_line_endings(job_of, ending):
    """A byte order mark and Windows line ends are accepted, also without a last line end."""
    job = job_of(b"\xef\xbb\xbf" + f'{{"prompt": "a"}}{ending}{{"prompt": "b"}}'.encode())
    assert [line.prompt for line in job] == ["a", "b"]


def test_utf16_is_an_error_of_its_lines(job_of):
    """A file in another encoding fails line by line, in words."""
    job = job_of('{"prompt": "a"}\n'.encode("utf-16"))
    errors = [line.error for line in job]
    assert errors
    assert all(error and error.code == "bad_json" for error in errors)


def test_the_fingerprint_is_that_of_the_file(job_of):
    """`sha256` is the digest of the file's bytes."""
    data = b'{"prompt": "a"}\n\nbroken'
    assert job_of(data).sha256 == hashlib.sha256(data).hexdigest()


def test_only_texts_need_a_tokenizer(job_of):
    """A job of token ids can run without a tokenizer; a text in it then fails alone."""
    assert not job_of('{"prompt_token_ids": [1]}\n').needs_tokenizer
    job = job_of('{"prompt_token_ids": [1]}\n{"prompt": "a"}\n')
    assert job.needs_tokenizer
    tokens, text = job
    assert tokens.to_request(None).prompt_token_ids == (1,)
    with pytest.raises(RequestError) as caught:
        text.to_request(None)
    assert caught.value.code == "no_tokenizer"


@pytest.mark.parametrize("data", [b"", b"\n \n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_input_without_a_request_is_refused(job_of, data):
    """An empty or blank file is a usage error that shows what a line looks like."""
    with pytest.raises(UsageError, match="has no request"):
        job_of(data)


def test_unreadable_inputs_are_refused(tmp_path):
    """A missing file, a directory and a pipe are usage errors."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    keep_open = os.open(pipe, os.O_RDWR)  # or opening it for reading would wait for a writer
    for path, words in [
        (tmp_path / "missing", "No such file"),
        (tmp_path, "directory"),
        (pipe, "not a regular file"),
    ]:
        with pytest.raises(UsageError, match=words):
            JobFile(path, DEFAULTS)
    os.close(keep_open)
