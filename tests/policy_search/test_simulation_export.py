"""Facts about what simulations write: CSV files as Splitwise's simulator, and Chrome traces."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policy_search.arrivals import TimedRequest
from policy_search.errors import PolicyError
from policy_search.latency import Latencies
from policy_search.scenario import Split
from policy_search.simulation_export import export
from policy_search.simulation_trace import TraceLog
from policy_search.simulator import run
from policy_search.trace_file import read_trace
from tests.policy_search.simulated import constant, scenario

SPLIT = Split(prompt_machines=1, token_machines=1, network=2.0, token_bytes=1)
REQUESTS = [
    TimedRequest(0.0, 8, 3, "a", "chat"),
    TimedRequest(0.5, 8, 1, "b", "code"),
    TimedRequest(2.0, 4, 5, "c", "chat"),
]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def exported(tmp_path):
    cluster = scenario(constant(1.0), SPLIT).cluster()
    times = run(cluster, REQUESTS)
    export(tmp_path / "results", cluster, REQUESTS, times)
    return tmp_path / "results", Latencies.of(REQUESTS, times)


def test_requests_are_in_their_applications_file(exported):
    directory, latencies = exported
    chat, code = (rows(directory / "detailed" / f"{name}.csv") for name in ("chat", "code"))
    assert list(chat[0]) == [
        "request_ids",
        "response_times",
        "queue_times",
        "ttft_times",
        "tbt_times",
        "nth_token_overheads",
        "prompt_sizes",
        "token_sizes",
    ]
    assert [row["request_ids"] for row in (*chat, *code)] == ["a", "c", "b"]
    assert [float(row["response_times"]) for row in chat] == latencies.e2e[[0, 2]].tolist()
    assert [float(row["ttft_times"]) for row in chat] == latencies.ttft[[0, 2]].tolist()
    # Of request a: 8 positions over a link of 2 a second, before its second token is begun.
    assert float(chat[0]["nth_token_overheads"]) == 4.0
    assert float(chat[0]["tbt_times"]) == pytest.approx((latencies.e2e - latencies.ttft)[0] / 3)
    assert (code[0]["prompt_sizes"], code[0]["token_sizes"]) == ("8", "1")


def test_the_summary_is_made_of_the_requests(exported):
    """Every column's statistics can be computed again from the other files."""
    directory, _ = exported
    names = ["mean", "std", "min", "max", "median", "p50", "p90", "p95", "p99", "p999", "geomean"]
    summaries = rows(directory / "summary.csv")
    assert [row["application_id"] for row in summaries] == ["chat", "code"]
    for row in summaries:
        requests = rows(directory / "detailed" / f"{row['application_id']}.csv")
        columns = [name for name in requests[0] if name != "request_ids"]
        assert list(row) == ["application_id"] + [f"{c}_{n}" for c in columns for n in names]
        for column in columns:
            values = [float(each[column]) for each in requests]
            again = {
                "mean": statistics.fmean(values),
                "std": statistics.pstdev(values),
                "min": min(values),
                "max": max(values),
                "median": statistics.median(values),
                "p50": statistics.median(values),
                "p90": np.percentile(values, 90),
                "p999": np.percentile(values, 99.9),
                "geomean": 0.0 if 0 in values else statistics.geometric_mean(values),
            }
            written = {name: float(row[f"{column}_{name}"]) for name in again}
            assert written == pytest.approx(again), column


def test_nodes_are_what_a_request_consists_of(exported):
    directory, _ = exported
    found = rows(directory / "request_nodes.csv")
    assert [tuple(row.values()) for row in found if row["request_id"] in "ab"] == [
        ("a", "2", "0", "PROMPT", "prompt machine 0", "0.0", "1.0"),
        ("a", "2", "1", "TOKEN", "token machine 1", "5.0", "7.0"),
        ("a", "2", "2", "KVCacheTransfer", "network", "1.0", "5.0"),
        ("b", "2", "0", "PROMPT", "prompt machine 0", "1.0", "2.0"),
    ]


def test_files_are_whole_or_not_there(exported, monkeypatch):
    """What was there stays if writing fails, and nothing is left beside it."""
    directory, _ = exported
    before = (directory / "summary.csv").read_text()
    cluster = scenario(constant(1.0)).cluster()
    times = run(cluster, REQUESTS[:1])
    monkeypatch.setattr(Path, "replace", _full_disk)
    with pytest.raises(PolicyError, match="No space left"):
        export(directory, cluster, REQUESTS[:1], times)
    assert (directory / "summary.csv").read_text() == before
    assert sorted(path.name for path in directory.rglob("*") if path.is_file()) == [
        "chat.csv",
        "code.csv",
        "request_nodes.csv",
        "summary.csv",
    ]


def _full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_splitwises_columns_come_back(exported, tmp_path):
    """A trace made of what was written is read again."""
    directory, _ = exported
    path = tmp_path / "again.csv"
    with path.open("w") as file:
        print(
            "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,"
            "token_size",
            file=file,
        )
        for row in rows(directory / "detailed" / "chat.csv"):
            sizes = row["prompt_sizes"], row["token_sizes"]
            print(row["request_ids"], 2, "chat", 0, 1, *sizes, sep=",", file=file)
    again = [(each.name, each.prompt, each.output) for each in read_trace(path)]
    assert again == [("a", 8, 3), ("c", 4, 5)]


def traced(tmp_path: Path, most: int) -> dict[str, Any]:
    log = TraceLog(most)
    run(scenario(constant(1.0), SPLIT).cluster(), REQUESTS, log)
    log.write(tmp_path / "trace.json")
    return json.loads((tmp_path / "trace.json").read_text())


def test_a_trace_shows_machines_resources_and_transfers(tmp_path):
    trace = traced(tmp_path, most=1000)
    events = trace["traceEvents"]
    named = {(e["pid"], e["tid"], e["args"]["name"]) for e in events if "name" in e["args"]}
    processes = {name for _, _, name in named}
    assert {"network", "prompt machine 0", "token machine 1", "sweeps", "compute"} <= processes
    shown = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] > 0 for event in shown)
    transfers = [(e["ts"], e["dur"], e["args"]) for e in shown if e["name"] == "request 0"]
    assert transfers == [(1e6, 4e6, {"bytes": 8})]
    assert trace["otherData"] == {"note": ""}


def test_a_long_trace_is_cut_off(tmp_path):
    whole = sum(event["ph"] == "X" for event in traced(tmp_path, most=1000)["traceEvents"])
    trace = traced(tmp_path, most=5)
    assert sum(event["ph"] == "X" for event in trace["traceEvents"]) == 5
    note = f"cut off: the first 5 events, {whole - 5} more are left out"
    assert trace["otherData"]["note"] == note
