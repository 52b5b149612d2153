"""Facts about text and tokens, on a tokenizer with one token per byte."""

from __future__ import annotations

import json

import pytest

from flexrun.errors import RequestError, UsageError
from flexrun.tokenizer import Tokenizer, end_token_ids
from tests.tiny_models import byte_tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer())


@pytest.mark.parametrize("text", ["hello", " two  spaces .", "naïve 漢字 🙂", "\n\t\x01"])
def test_text_survives_the_way_there_and_back(tokenizer, text):
    """Decoding what was encoded gives the text, without clean-up of spaces."""
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_skipped_on_demand(tokenizer):
    """The end-of-sequence token is left out of the text unless asked for."""
    assert tokenizer.decode([104, 105, 0]) == "hi"
    assert len(tokenizer.decode([104, 105, 0], skip_special_tokens=False)) == 3


def test_load_reads_a_directory(tokenizer, tmp_path):
    """A saved tokenizer loads again."""
    tokenizer.hf.save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).encode("abc") == [97, 98, 99]


def test_directory_without_tokenizer_is_a_usage_error(tmp_path):
    """A directory without tokenizer files is refused in words."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="cannot load a tokenizer"):
        Tokenizer.load(tmp_path)


def test_chat_ends_where_the_assistant_begins(tokenizer):
    """Messages go through the chat template, with the generation prompt."""
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert bytes(ids) == b"user: hi\nassistant: "


def test_model_without_chat_template_refuses_messages(tokenizer):
    """Without a chat template the request fails with the code chat_template."""
    tokenizer.hf.chat_template = None
    with pytest.raises(RequestError, match="no chat template") as caught:
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert caught.value.code == "chat_template"


def test_what_the_template_refuses_is_a_request_error(tokenizer):
    """An exception raised by the template becomes the request's error."""
    tokenizer.hf.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert caught.value.code == "chat_template"


def test_text_that_is_not_unicode_is_a_request_error(tokenizer):
    """Half of a surrogate pair is refused, not a crash."""
    with pytest.raises(RequestError) as caught:
        tokenizer.encode("\ud800")
    assert caught.value.code == "bad_request"


def test_end_tokens_come_from_every_file(tokenizer, tmp_path):
    """Generation config (number or list), config, text_config and tokenizer are united."""
    assert end_token_ids(tmp_path, None) == frozenset()
    assert end_token_ids(tmp_path, tokenizer) == {0}
    config = {"eos_token_id": 5, "text_config": {"eos_token_id": [6]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert end_token_ids(tmp_path, tokenizer) == {0, 5, 6, 7, 8}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert end_token_ids(tmp_path, None) == {5, 6}
