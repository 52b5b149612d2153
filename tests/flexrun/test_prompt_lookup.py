"""Facts about guesses from what a sequence had before."""

from __future__ import annotations

import random

import pytest

from flexrun.prompt_lookup import LONGEST_NGRAM, MOST_DRAFTS, SHORTEST_NGRAM, PromptLookup


def brute_force(tokens: list[int], width: int) -> list[int]:
    """The same by comparing every place, the last one first."""
    for size in range(LONGEST_NGRAM, SHORTEST_NGRAM - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[len(tokens) - size :]:
                follow = tokens[start + size :]
                return [follow[index % len(follow)] for index in range(width)]
    return []


@pytest.mark.parametrize("seed", range(30))
def test_guesses_are_what_followed_the_last_time(seed):
    """For a sequence that grows token by token, and by several at once."""
    draw = random.Random(seed)
    lookup, tokens = PromptLookup(), draw.choices(range(4), k=draw.randint(1, 30))
    for _ in range(60):
        assert lookup.propose(tokens) == brute_force(tokens, lookup._width)
        tokens = tokens + draw.choices(range(4), k=draw.randint(1, 3))


def test_a_new_text_has_no_guess():
    lookup = PromptLookup()
    for count in range(20):
        assert lookup.propose(list(range(count))) == []


def test_right_guesses_grow():
    """Twice as many after each that was all right, up to a bound; fewer after others."""
    lookup, tokens = PromptLookup(), [1, 2, 3] * 20
    lengths = []
    for _ in range(5):
        lengths.append(len(lookup.propose(tokens[:20])))
        lookup.learn(lengths[-1], lengths[-1])
    assert lengths[0] < MOST_DRAFTS == max(lengths)
    lookup.learn(MOST_DRAFTS, 2)
    assert len(lookup.propose(tokens[:20])) == 3


def test_wrong_guesses_become_rare():
    """Of 400 chances to guess wrong few are taken, and the first after a right one at once."""
    lookup, tokens = PromptLookup(), [1, 2, 3] * 20
    tried = 0
    for _ in range(400):
        if drafts := lookup.propose(tokens):
            tried += len(drafts)
            lookup.learn(len(drafts), 0)
    assert tried < 30
    while not (drafts := lookup.propose(tokens)):
        pass
    lookup.learn(len(drafts), len(drafts))
    assert lookup.propose(tokens)


def test_what_had_no_row_is_not_held_against_it():
    lookup = PromptLookup()
    for _ in range(10):
        assert lookup.propose([1, 2, 3, 1, 2])
        lookup.learn(0, 0)
