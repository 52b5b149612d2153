"""Facts about what users may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from flexrun import SamplingParams, UsageError


def test_greedy_is_temperature_zero():
    """Temperature 0, and only 0, is greedy."""
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=0.01).greedy


@pytest.mark.parametrize(
    ("given", "kept"), [("a", ("a",)), (["a", "b"], ("a", "b")), (None, ()), ([], ())]
)
def test_stop_is_one_text_or_a_list(given, kept):
    """A stop text may be given alone, in a list, or not at all."""
    assert SamplingParams(stop=given).stop == kept


def test_params_are_hashable_data():
    """Equal parameters are equal and hash alike, also when lists were given."""
    lists: dict[str, Any] = {"stop_token_ids": [1], "stop": ["a"]}
    assert hash(SamplingParams(**lists)) == hash(SamplingParams(stop_token_ids=(1,), stop=("a",)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 10**9),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.0),
        ("min_p", 1.1),
        ("seed", 1.5),
        ("stop", ""),
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop", [1]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("ignore_eos", 1),
        ("max_tokens", 0),
        ("max_tokens", None),
        ("min_tokens", 17),
        ("min_tokens", -1),
        ("skip_special_tokens", "yes"),
    ],
)
def test_impossible_values_are_refused(name, value):
    """A value of the wrong type or range is a `UsageError` that names the field."""
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})
