"""A simulation as CSV files with the columns of Splitwise's simulator (ISCA 2024)."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from policy_search.exported_file import export_whole, make_directory
from policy_search.latency import Latencies

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from policy_search.arrivals import TimedRequest
    from policy_search.cluster import Cluster
    from policy_search.request_times import RequestTimes

FLAG = "--csv"
NODE_COLUMNS = (
    "request_id",
    "request_type",
    "node_id",
    "node_type",
    "runner",
    "start_timestamp",
    "completion_timestamp",
)
_GENERATIVE_LLM = 2
"""The type of request, as its simulator counts them."""


def make_export_directories(directory: Path) -> None:
    """What `export` writes into. Raises `PolicyError`."""
    make_directory(directory, FLAG)
    make_directory(directory / "detailed", FLAG)


def export(
    directory: Path, cluster: Cluster, requests: Sequence[TimedRequest], times: RequestTimes
) -> None:
    """Write summary.csv (a row for each application), detailed/APPLICATION.csv (a row for each
    request) and request_nodes.csv (one for each prompt, transfer and row of tokens). Times are
    seconds. Raises `PolicyError`.
    """
    make_export_directories(directory)
    columns = _columns(requests, times)
    applications: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        applications.setdefault(request.application, []).append(number)
    summaries = []
    for application, numbers in sorted(applications.items()):
        own = {name: [values[number] for number in numbers] for name, values in columns.items()}
        rows = zip(*own.values())
        path = directory / "detailed" / f"{application}.csv"
        export_whole(path, _lines(list(own), rows), FLAG)
        summaries.append({"application_id": application} | summary(own))
    header = list(summaries[0]) if summaries else ["application_id"]
    lines = _lines(header, (each.values() for each in summaries))
    export_whole(directory / "summary.csv", lines, FLAG)
    nodes = _lines(NODE_COLUMNS, _nodes(cluster, requests, times))
    export_whole(directory / "request_nodes.csv", nodes, FLAG)


def summary(columns: Mapping[str, Sequence[float | str]]) -> dict[str, float]:
    """Statistics of every column with numbers, as `COLUMN_STATISTIC`."""
    import numpy as np

    found: dict[str, float] = {}
    for name, values in columns.items():
        if name != "request_ids":
            named = _statistics(np.asarray(values, float))
            found |= {f"{name}_{statistic}": value for statistic, value in named.items()}
    return found


def _statistics(values: np.ndarray) -> dict[str, float]:
    import numpy as np

    percentiles = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
    points = {name: float(np.percentile(values, at)) for name, at in percentiles.items()}
    with np.errstate(divide="ignore"):  # of a zero the geometric mean is zero
        geomean = float(np.exp(np.log(values).mean()))
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        "median": points["p50"],
        **points,
        "geomean": geomean,
    }


def _columns(
    requests: Sequence[TimedRequest], times: RequestTimes
) -> dict[str, Sequence[float | str]]:
    latencies = Latencies.of(requests, times)
    resumed = times.resumed
    overheads = [resumed[n][0] - first if n in resumed else 0.0 for n, first in _numbered(times)]
    pairs = zip(requests, latencies.e2e - latencies.ttft)
    return {
        "request_ids": [_name(number, request) for number, request in enumerate(requests)],
        "response_times": latencies.e2e.tolist(),
        "queue_times": latencies.queue.tolist(),
        "ttft_times": latencies.ttft.tolist(),
        # Over all tokens, the first one too: that is how it is defined there.
        "tbt_times": [float(seconds) / request.output for request, seconds in pairs],
        "nth_token_overheads": overheads,
        "prompt_sizes": [request.prompt for request in requests],
        "token_sizes": [request.output for request in requests],
    }


def _numbered(times: RequestTimes) -> Iterator[tuple[int, float]]:
    return iter(enumerate(times.first))


def _name(number: int, request: TimedRequest) -> str:
    return request.name or str(number)


def _nodes(
    cluster: Cluster, requests: Sequence[TimedRequest], times: RequestTimes
) -> Iterator[tuple[object, ...]]:
    """What each request consists of."""
    transfers = cluster.network.transfers if cluster.network is not None else {}
    for number, request in enumerate(requests):
        name, first = _name(number, request), times.first[number]
        runner = cluster.machines[times.machine[number]].name
        start, where = times.resumed.get(number, (first, times.machine[number]))
        parts: list[tuple[object, ...]] = [("PROMPT", runner, times.begun[number], first)]
        if request.output > 1:
            other = cluster.machines[where].name
            parts.append(("TOKEN", other, start, times.finished[number]))
        if number in transfers:
            moved = transfers[number]
            parts.append(("KVCacheTransfer", "network", moved.start, moved.end))
        for node, part in enumerate(parts):
            yield (name, _GENERATIVE_LLM, node, *part)


def _lines(header: Sequence[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in (header, *rows):
        writer.writerow(row)
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
