"""Traces of requests as CSV files, in the columns of three published simulators and traces."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from policy_search.arrivals import TimedRequest
from policy_search.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    Row = dict[str, str]

_APPLICATION = re.compile(r"[A-Za-z0-9_-]+")
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?")


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """Columns that a trace has to have; others are ignored."""

    columns: tuple[str, ...]
    read: Callable[[Row], TimedRequest]
    from_zero: bool = False
    """Times are dates: the first request's is when the clock starts."""


def read_trace(path: Path) -> list[TimedRequest]:
    """The requests of a trace, in the order of its rows. Raises `PolicyError`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            chosen = _format_of(path, reader.fieldnames or ())
            requests = list(_requests(path, reader, chosen))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PolicyError(f"cannot read the trace {path}: {error}") from None
    if not requests:
        raise PolicyError(f"the trace {path} has no request", hint="give one with rows in it")
    if not chosen.from_zero:
        return requests
    start = min(request.arrival for request in requests)
    return [request._replace(arrival=request.arrival - start) for request in requests]


def _format_of(path: Path, header: Sequence[str]) -> TraceFormat:
    names = {name.strip() for name in header}
    for each in FORMATS.values():
        if names.issuperset(each.columns):
            return each
    known = "; ".join(f"{name}: {','.join(each.columns)}" for name, each in FORMATS.items())
    raise PolicyError(
        f"the columns of the trace {path} are not known: {','.join(header) or 'none'}",
        hint=f"the first line has to name those of one of these. {known}",
    )


def _requests(
    path: Path, reader: csv.DictReader[str], chosen: TraceFormat
) -> Iterator[TimedRequest]:
    for row in reader:
        try:
            if None in row or None in row.values():
                raise ValueError("it has not as many values as there are columns")
            yield chosen.read({name.strip(): value.strip() for name, value in row.items()})
        except ValueError as error:
            raise PolicyError(
                f"line {reader.line_num} of the trace {path}: {error}",
                hint="correct or remove this line",
            ) from None


def _splitwise(row: Row) -> TimedRequest:
    if row["batch_size"] != "1":
        raise ValueError(f"batch_size is {row['batch_size']!r}; only 1 is known")
    if not _APPLICATION.fullmatch(row["application_id"]):
        raise ValueError(
            f"application_id is {row['application_id']!r}: letters, digits, - and _ are allowed"
        )
    return TimedRequest(
        _seconds(row, "arrival_timestamp"),
        _tokens(row, "prompt_size"),
        _tokens(row, "token_size"),
        row["request_id"],
        row["application_id"],
    )


def _vidur(row: Row) -> TimedRequest:
    prompt, output = _tokens(row, "num_prefill_tokens"), _tokens(row, "num_decode_tokens")
    return TimedRequest(_seconds(row, "arrived_at"), prompt, output)


def _azure(row: Row) -> TimedRequest:
    found = _TIMESTAMP.fullmatch(row["TIMESTAMP"])
    if found is None:
        raise ValueError(f"TIMESTAMP is {row['TIMESTAMP']!r}, not such as 2023-11-16 18:15:46.68")
    second, fraction, zone = found.groups()
    # Python 3.10 reads neither fractions of seven digits nor Z.
    offset = "+00:00" if zone in (None, "Z") else zone
    moment = datetime.fromisoformat(second + offset).astimezone(timezone.utc)
    arrival = moment.timestamp() + float(fraction or 0)
    return TimedRequest(arrival, _tokens(row, "ContextTokens"), _tokens(row, "GeneratedTokens"))


def _tokens(row: Row, name: str) -> int:
    """A whole number; Vidur writes some as 12.0."""
    text = row[name].removesuffix(".0")
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ValueError(f"{name} is {row[name]!r}, not a whole number of at least 1")
    return int(text)


def _seconds(row: Row, name: str) -> float:
    try:
        seconds = float(row[name])
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{name} is {row[name]!r}, not a number of seconds of at least 0")
    return seconds


FORMATS = {
    "Splitwise": TraceFormat(
        (
            "request_id",
            "request_type",
            "application_id",
            "arrival_timestamp",
            "batch_size",
            "prompt_size",
            "token_size",
        ),
        _splitwise,
    ),
    "Vidur": TraceFormat(("arrived_at", "num_prefill_tokens", "num_decode_tokens"), _vidur),
    "Azure": TraceFormat(("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _azure, from_zero=True),
}
"""Splitwise's simulator (ISCA 2024), Vidur's (MLSys 2024), Azure's LLM inference traces (2023)."""
