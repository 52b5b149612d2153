"""Facts about the policy and its file."""

from __future__ import annotations

import json
import re

import pytest

from offload.errors import SplitError
from offload.tiers import Split
from policy_search.errors import PolicyError
from policy_search.policy import Policy

UNUSUAL = Policy(
    weights=Split(device=12.5, host=37.5, disk=50),
    kv_cache=Split(device=50, host=50),
    micro_batch_rows=3,
    num_micro_batches=4,
    max_rows=5,
    max_sequences=6,
    page_tokens=7,
    prefetch_depth=8,
    overlap=False,
    kv_bits=4,
    group_size=32,
)


@pytest.mark.parametrize("policy", [Policy(), UNUSUAL], ids=["default", "unusual"])
def test_a_policy_is_read_back_as_it_was_written(policy, tmp_path):
    """Every field survives the way through JSON, a file, and a report that contains the policy."""
    assert Policy.from_json(policy.to_json()) == policy
    path = tmp_path / "policy.json"
    path.write_text(policy.to_json())
    assert Policy.load(path) == policy
    report = json.dumps({"policy": json.loads(policy.to_json()), "predicted": 1})
    assert Policy.from_json(report) == policy


def test_splits_are_written_as_on_the_command_line():
    """A person can copy a split from the file to a flag."""
    written = json.loads(UNUSUAL.to_json())
    assert written["weights"] == "device=12.5,host=37.5,disk=50"
    assert Split.parse(written["kv_cache"]) == UNUSUAL.kv_cache


def test_missing_fields_have_their_defaults():
    """A file may hold just what differs from the defaults."""
    assert Policy.from_json('{"max_rows": 9}') == Policy(max_rows=9)
    assert Policy.from_json('{"num_micro_batches": null}') == Policy()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "the policy is not JSON"),
        ("[1]", "a policy is one JSON object"),
        ('{"max_row": 9}', "unknown policy field 'max_row'"),
        ('{"max_rows": 0}', "policy field max_rows must be a whole number of at least 1, not 0"),
        ('{"page_tokens": 0}', "policy field page_tokens must be a whole number"),
        ('{"prefetch_depth": -1}', "policy field prefetch_depth must be a whole number"),
        ('{"max_rows": 1.5}', "must be a whole number of at least 1, not 1.5"),
        ('{"max_rows": true}', "must be a whole number of at least 1, not True"),
        ('{"max_rows": null}', "must be a whole number of at least 1, not None"),
        ('{"kv_bits": 8}', "policy field kv_bits must be one of 16, 4"),
        ('{"kv_bits": "4"}', "policy field kv_bits must be one of 16, 4"),
        ('{"overlap": 1}', "overlap must be true or false"),
        ('{"weights": 100}', "policy field weights must be a split such as"),
    ],
)
def test_a_bad_policy_is_explained(text, words):
    """What is wrong with a policy is named by field and value."""
    with pytest.raises(PolicyError, match=re.escape(words)):
        Policy.from_json(text)


def test_a_bad_split_is_explained():
    """A split that cannot be read is an error that shows one that can."""
    with pytest.raises(SplitError, match="a split looks like"):
        Policy.from_json('{"weights": "gpu=100"}')


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """A missing file and one that is not text are errors with the path."""
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.json", binary):
        with pytest.raises(PolicyError, match=re.escape(f"cannot read the policy {path}")):
            Policy.load(path)


@pytest.mark.parametrize(
    "name", ["micro_batch_rows", "num_micro_batches", "max_rows", "max_sequences"]
)
def test_counts_are_positive(name):
    """A policy without rows or sequences cannot be made."""
    with pytest.raises(PolicyError, match=f"{name} must be at least 1, not 0"):
        Policy(**{name: 0})  # type: ignore[arg-type]
