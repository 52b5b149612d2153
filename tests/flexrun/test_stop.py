"""Facts about when a completion ends and what its text is; every token is one byte."""

from __future__ import annotations

import pytest

from flexrun.errors import RequestError
from flexrun.request import SamplingParams
from flexrun.stop import StopChecker
from flexrun.tokenizer import Tokenizer
from tests.tiny_models import byte_tokenizer

END = frozenset({0})


class CountingTokenizer(Tokenizer):
    """Notes how many tokens each decoding reads."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer())
        self.decoded: list[int] = []

    def decode(self, token_ids, skip_special_tokens=True):
        self.decoded.append(len(token_ids))
        return super().decode(token_ids, skip_special_tokens)


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    return CountingTokenizer()


def feed(checker: StopChecker, data: bytes) -> int:
    """Append bytes until the checker says it has ended; returns how many it took."""
    for count, token in enumerate(data, start=1):
        if checker.append(token):
            return count
    return len(data)


def test_length_ends_a_completion(tokenizer):
    """After max_tokens, or the context's smaller limit, the reason is length."""
    for limit, taken in ((None, 5), (3, 3)):
        checker = StopChecker(SamplingParams(max_tokens=5), END, tokenizer, max_tokens=limit)
        assert feed(checker, b"abcdefgh") == taken
        output = checker.output(2)
        assert (output.index, output.text, output.finish_reason) == (
            2,
            "abcdefgh"[:taken],
            "length",
        )


@pytest.mark.parametrize("skip", [True, False])
def test_end_token_is_counted_but_not_text(tokenizer, skip):
    """The end-of-sequence token is among the token ids and not in the text."""
    checker = StopChecker(SamplingParams(skip_special_tokens=skip), END, tokenizer)
    assert feed(checker, b"ab\0cd") == 3
    output = checker.output(0)
    assert (output.text, output.token_ids, output.finish_reason) == ("ab", (97, 98, 0), "stop")
    assert output.stop_reason is None


def test_ignore_eos_goes_on(tokenizer):
    """With ignore_eos only the length, stop texts and stop tokens end a completion."""
    checker = StopChecker(SamplingParams(ignore_eos=True, max_tokens=4), END, tokenizer)
    assert feed(checker, b"a\0bc") == 4
    assert checker.output(0).text == "abc"


def test_stop_token_is_the_reason(tokenizer):
    """A stop token ends the completion, is named, and is not part of the text."""
    checker = StopChecker(SamplingParams(stop_token_ids=(ord("c"),)), END, tokenizer)
    assert feed(checker, b"abcd") == 3
    output = checker.output(0)
    assert (output.text, output.stop_reason, output.finish_reason) == ("ab", ord("c"), "stop")


@pytest.mark.parametrize("prompt", [b"", b"some prompt st"])
def test_stop_text_over_many_tokens(tokenizer, prompt):
    """A stop text is found over token borders, but never begins in the prompt."""
    params = SamplingParams(stop=("stop", "zzz"), max_tokens=99)
    checker = StopChecker(params, END, tokenizer, prompt)
    assert feed(checker, b"op no stop and more") == 10
    output = checker.output(0)
    assert (output.text, output.stop_reason) == ("op no ", "stop")
    assert bytes(output.token_ids) == b"op no stop"


def test_earliest_stop_text_wins(tokenizer):
    """Of two stop texts completed by one token, the one that begins first cuts the text."""
    checker = StopChecker(SamplingParams(stop=("d", "bcd"), max_tokens=99), END, tokenizer)
    assert feed(checker, b"abcde") == 4
    assert checker.output(0).text == "a"


@pytest.mark.parametrize("text", ["é漢🙂", "a🙂🙂b", "漢"])
def test_characters_cut_into_tokens(tokenizer, text):
    """A character whose bytes are separate tokens is read whole, also as stop text."""
    checker = StopChecker(SamplingParams(stop=("字",), max_tokens=99), END, tokenizer)
    data = (text + "字").encode()
    assert feed(checker, data + b"tail") == len(data)
    assert checker.output(0).text == text
    plain = StopChecker(SamplingParams(max_tokens=99), END, tokenizer, b"x")
    feed(plain, text.encode())
    assert plain.output(0).text == text


def test_bytes_that_are_no_text_do_not_hide_a_stop(tokenizer):
    """After any amount of invalid UTF-8 a stop text is still found."""
    checker = StopChecker(SamplingParams(stop=("END",), max_tokens=999), END, tokenizer)
    assert feed(checker, b"\xff" * 100 + b"\xe6END more") == 104
    assert set(checker.output(0).text) <= {"\ufffd"}


def test_character_begun_by_the_prompt(tokenizer):
    """When the prompt ends within a character, the text has that character."""
    start, rest = "é".encode()[:1], "é!".encode()[1:]
    checker = StopChecker(SamplingParams(max_tokens=2), END, tokenizer, b"abc" + start)
    feed(checker, rest)
    assert checker.output(0).text == "é!"


def test_decoding_reads_a_short_window(tokenizer):
    """Looking for stop texts costs the same for the thousandth token as for the tenth."""
    checker = StopChecker(SamplingParams(stop=("never",), max_tokens=2000), END, tokenizer)
    feed(checker, b"abcdefghij" * 100)
    assert max(tokenizer.decoded) <= 12


def test_nothing_is_decoded_without_stop_texts(tokenizer):
    """Without stop texts the text is decoded once, at the end."""
    checker = StopChecker(SamplingParams(max_tokens=100), END, tokenizer)
    feed(checker, b"a" * 100)
    assert tokenizer.decoded == []
    assert checker.output(0).text == "a" * 100


def test_min_tokens_holds_back_every_stop(tokenizer):
    """Before min_tokens, end and stop tokens are banned and stop texts are not looked for."""
    params = SamplingParams(min_tokens=3, stop=("b",), stop_token_ids=(9,), max_tokens=99)
    checker = StopChecker(params, END, tokenizer)
    assert checker.banned() == (0, 9)
    assert feed(checker, b"ab") == 2
    assert checker.finish_reason is None
    assert feed(checker, b"cb") == 2
    assert not checker.banned()
    assert checker.output(0).text == "abc"


def test_stop_texts_need_a_tokenizer():
    """Without a tokenizer there is no text, and stop texts are refused."""
    checker = StopChecker(SamplingParams(max_tokens=1), END, None)
    checker.append(5)
    assert (checker.output(0).text, checker.output(0).token_ids) == ("", (5,))
    with pytest.raises(RequestError, match="tokenizer"):
        StopChecker(SamplingParams(stop=("x",)), END, None)
