"""Facts about the Chrome trace of a run."""

from __future__ import annotations

import json

import pytest

from flexrun import LLM, SamplingParams
from flexrun.errors import UsageError
from flexrun.trace import check_writable, write_trace
from offload import timeline
from offload.timeline import Interval
from tests.end_to_end.harness import engine_of


def events_of(path, kind="X"):
    return [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == kind]


def test_requests_that_overlap_get_rows_of_their_own(tmp_path):
    """Every interval is an event of its row's process; overlapping ones are in other threads."""
    intervals = [
        Interval("disk->host", "weights", 1.0, 3.0, 10),
        Interval("disk->host", "weights", 2.0, 4.0, 20),
        Interval("compute", "unit 0", 2.5, 2.75, 0),
        Interval("disk->host", "kv", 3.0, 5.0, 30),
    ]
    path = tmp_path / "trace.json"
    write_trace(path, intervals)
    names = {e["pid"]: e["args"]["name"] for e in events_of(path, "M") if "name" in e["args"]}
    found = [(names[e["pid"]], e["tid"], e["ts"], e["dur"]) for e in events_of(path)]
    assert found == [
        ("disk->host", 0, 0.0, 2e6),
        ("disk->host", 1, 1e6, 2e6),
        ("compute", 0, 1.5e6, 0.25e6),
        ("disk->host", 0, 2e6, 2e6),
    ]


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_run_can_be_traced(tiny_llama_dir, tmp_path, device):
    """The trace of a run has a row for each link it used, for compute and for sampling."""
    path = tmp_path / "trace.json"
    settings = {"device": device, "weights": "disk=100", "trace": path, "num_micro_batches": 2}
    with LLM(tiny_llama_dir, **settings) as llm:
        prompts = [{"prompt_token_ids": [5, 6, 7 + i]} for i in range(4)]
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        llm.generate(prompts, params, use_tqdm=False)
        engine_of(llm).write_trace()
        summary = llm.summary()
    names = {e["args"].get("name") for e in events_of(path, "M")} - {None}
    links = {"disk->device"} if device == "cpu" else {"disk->host", "host->device"}
    assert (
        names == {"compute", "sampling"} | links == {"compute", "sampling"} | set(summary["links"])
    )
    for link in links:
        sent = sum(e["args"]["bytes"] for e in events_of(path) if _row(path, e) == link)
        assert sent == summary["bytes"][link]


def _row(path, event):
    return next(
        e["args"]["name"]
        for e in events_of(path, "M")
        if e["pid"] == event["pid"] and "name" in e["args"]
    )


def test_a_trace_that_cannot_be_written_is_refused_at_once(tmp_path):
    """The error names the file and the flag."""
    with pytest.raises(UsageError, match="nowhere") as caught:
        check_writable(tmp_path / "nowhere" / "trace.json")
    assert "--trace" in str(caught.value)


def test_a_trace_that_is_cut_off_says_so(tiny_llama_dir, tmp_path, monkeypatch, caplog):
    """Beyond the most intervals that are kept, the trace is written and a warning tells of it."""
    monkeypatch.setattr(timeline, "MOST_TRACED", 5)
    path = tmp_path / "trace.json"
    with LLM(tiny_llama_dir, device="cpu", weights="disk=100", trace=path) as llm:
        params = SamplingParams(temperature=0, max_tokens=2)
        llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
        engine_of(llm).write_trace()
    assert len(events_of(path)) == 5
    assert "first part only" in caplog.text
