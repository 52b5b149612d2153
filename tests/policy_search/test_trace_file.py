"""Facts about files of requests: traces of three kinds, and prompts whose tokens are given."""

from __future__ import annotations

import json

import pytest

from policy_search.arrivals import TimedRequest
from policy_search.errors import PolicyError
from policy_search.prompt_lengths import lengths_of_token_ids
from policy_search.trace_file import FORMATS, read_trace
from policy_search.workload import Lengths

SPLITWISE = "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,"
SPLITWISE += "token_size\n"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def trace(tmp_path):
    def written(text: str, encoding: str = "utf-8"):
        path = tmp_path / "trace.csv"
        path.write_text(text, encoding=encoding)
        return path

    return written


def test_splitwise(trace):
    path = trace(SPLITWISE + "7,2,chat,0.25,1,100,20\n8,2,code,0.5,1,30,4\n")
    assert read_trace(path) == [
        TimedRequest(0.25, 100, 20, "7", "chat"),
        TimedRequest(0.5, 30, 4, "8", "code"),
    ]


def test_vidur_in_any_order_of_columns_and_rows(trace):
    """Requests keep the places of their rows; arrivals need not rise."""
    text = "num_decode_tokens,extra,arrived_at,num_prefill_tokens\n5,x,2.5,10\n6,y,1e-1,11.0\n"
    assert read_trace(trace(text)) == [TimedRequest(2.5, 10, 5), TimedRequest(0.1, 11, 6)]


def test_azure_starts_with_its_first_request(trace):
    """Seven digits of a second, time zones, and a byte order mark."""
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.6805900,396,109\n"
    rows += "2023-11-16T19:15:46.1805900+01:00,9,1\n2023-11-16 18:15:48Z,9,1\n"
    requests = read_trace(trace(AZURE + rows, encoding="utf-8-sig"))
    assert [each.arrival for each in requests] == pytest.approx([0.5, 1.5, 0.0, 1.81941], abs=1e-6)
    assert requests[1][1:3] == (396, 109)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "are not known: none"),
        ("a,b\n1,2\n", "are not known: a,b"),
        (VIDUR, "has no request"),
        (VIDUR + "0,1,1\n0,1\n", "line 3 .* not as many values"),
        (VIDUR + "0,1,1,1\n", "line 2 .* not as many values"),
        (VIDUR + "0,1,1\n\n-1,1,1\n", "line 4 .*arrived_at is '-1'"),
        (VIDUR + "nan,1,1\n", "line 2 .*arrived_at is 'nan'"),
        (VIDUR + "soon,1,1\n", "line 2 .*arrived_at is 'soon'"),
        (VIDUR + "0,0,1\n", "line 2 .*num_prefill_tokens is '0'"),
        (VIDUR + "0,1,2.5\n", "line 2 .*num_decode_tokens is '2.5'"),
        (VIDUR + "0,1,\u0663\n", "line 2 .*num_decode_tokens is"),
        (VIDUR + '0,"1,1\n', "cannot read the trace"),
        (SPLITWISE + "7,2,0,0,4,100,20\n", "line 2 .*batch_size is '4'"),
        (SPLITWISE + "7,2,../x,0,1,100,20\n", "line 2 .*application_id is '../x'"),
        (AZURE + "yesterday,1,1\n", "line 2 .*TIMESTAMP is 'yesterday'"),
        (AZURE + "2023-13-16 18:15:46,1,1\n", "line 2 .*month must be"),
    ],
)
def test_what_is_no_trace_is_refused(trace, text, says):
    """With the line; if the columns are wrong, with those that are known."""
    with pytest.raises(PolicyError, match=says) as refused:
        read_trace(trace(text))
    if "are not known" in says:
        assert all(",".join(each.columns) in str(refused.value) for each in FORMATS.values())


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "latin.csv").write_bytes(VIDUR.encode() + b"\xff\n")
    for name in ("latin.csv", "nowhere.csv", "."):
        with pytest.raises(PolicyError, match="cannot read the trace"):
            read_trace(tmp_path / name)


def test_token_ids_have_lengths(tmp_path):
    """As many completions as wanted, of max_tokens or what is given for all."""
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [5], "max_tokens": 9, "n": 2}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert lengths_of_token_ids(path, gen_len=4) == [Lengths(3, 4), Lengths(1, 9), Lengths(1, 9)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no request"),
        ("{", "line 1 .* is not JSON"),
        ("\n[]", "line 2 .* has no prompt_token_ids"),
        ('{"prompt": "x"}', "has no prompt_token_ids"),
        ('{"prompt_token_ids": []}', "has no prompt_token_ids"),
        ('{"prompt_token_ids": [1], "max_tokens": 0}', "max_tokens must be a whole number"),
        ('{"prompt_token_ids": [1], "n": 9000000}', "n must be .* to 1000000"),
        ('{"prompt_token_ids": [1], "n": true}', "n must be a whole number"),
    ],
)
def test_prompts_without_lengths_are_refused(tmp_path, text, says):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(PolicyError, match=says):
        lengths_of_token_ids(path, gen_len=4)


def test_a_missing_prompt_file_is_refused(tmp_path):
    with pytest.raises(PolicyError, match="cannot read the input"):
        lengths_of_token_ids(tmp_path / "nowhere", gen_len=4)
