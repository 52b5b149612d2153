"""A run as a Chrome trace: open it in chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from flexrun.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from offload.timeline import Interval


def write_trace(path: Path, intervals: Sequence[Interval]) -> None:
    """One row per link, one for compute, one for sampling. Raises `UsageError`."""
    try:
        with path.open("w", encoding="utf-8") as file:
            json.dump({"traceEvents": list(_events(intervals)), "displayTimeUnit": "ms"}, file)
    except OSError as error:
        raise UsageError(
            f"cannot write the trace {path}: {error.strerror or error}",
            hint="choose another file with --trace",
        ) from error


def check_writable(path: Path) -> None:
    """Raise `UsageError` now, not after hours of work, if a trace cannot be written."""
    write_trace(path, [])


def _events(intervals: Sequence[Interval]) -> Iterator[dict[str, Any]]:
    """Overlapping requests of one link get rows of their own under the link's name."""
    start = min((interval.start for interval in intervals), default=0.0)
    rows = sorted({interval.row for interval in intervals})
    for number, row in enumerate(rows):
        yield {"ph": "M", "pid": number, "name": "process_name", "args": {"name": row}}
        yield {
            "ph": "M",
            "pid": number,
            "name": "process_sort_index",
            "args": {"sort_index": number},
        }
    free_at: dict[str, list[float]] = {row: [] for row in rows}
    for interval in intervals:
        lanes = free_at[interval.row]
        lane = next((i for i, end in enumerate(lanes) if end <= interval.start), len(lanes))
        lanes[lane:] = [interval.end, *lanes[lane + 1 :]]
        yield {
            "ph": "X",
            "pid": rows.index(interval.row),
            "tid": lane,
            "name": interval.name,
            "ts": round((interval.start - start) * 1e6, 3),
            "dur": round((interval.end - interval.start) * 1e6, 3),
            "args": {"bytes": interval.nbytes} if interval.nbytes else {},
        }
