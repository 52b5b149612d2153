"""A simulation as a Chrome trace: open it in chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from policy_search.event_log import EventLog
from policy_search.exported_file import export_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from policy_search.network import Transfer
    from policy_search.simulated_machine import SimulatedMachine, Sweep

FLAG = "--trace-out"
MOST_EVENTS = 100_000
"""About 15 MB; viewers get slow with more."""


class TraceLog(EventLog):
    """Collects sweeps, resources and transfers, a row of the trace each."""

    def __init__(self, most: int = MOST_EVENTS) -> None:
        self._most = most
        self._events: list[dict[str, Any]] = []
        self._machines: dict[int, str] = {}
        self._rows: dict[tuple[int, str], int] = {}
        self.left_out = 0
        """Events that were too many."""

    def sweep(self, machine: SimulatedMachine, sweep: Sweep) -> None:
        """A row for the machine's sweeps, and one for each resource: busy from the beginning of the
        sweep, as long as it works in it.
        """
        self._machines.setdefault(machine.number + 1, machine.name)
        process, load = machine.number + 1, sweep.load
        arguments = {"rows": load.rows, "generating": load.generating, "positions": load.positions}
        self._add(process, "sweeps", "sweep", sweep.start, sweep.terms.seconds, arguments)
        for resource, seconds in sweep.terms.busy.items():
            self._add(process, resource, resource, sweep.start, seconds, {})

    def transfer(self, transfer: Transfer) -> None:
        """Transfers share a row: they follow each other."""
        self._machines.setdefault(0, "network")
        arguments = {"bytes": transfer.nbytes}
        name, seconds = f"request {transfer.request}", transfer.end - transfer.start
        self._add(0, "transfers", name, transfer.start, seconds, arguments)

    def _add(
        self,
        process: int,
        row: str,
        name: str,
        start: float,
        seconds: float,
        arguments: Mapping[str, float],
    ) -> None:
        if len(self._events) >= self._most:
            self.left_out += 1
            return
        thread = self._rows.setdefault((process, row), len(self._rows))
        times = {"ts": round(start * 1e6, 3), "dur": round(seconds * 1e6, 3)}
        event = {"ph": "X", "pid": process, "tid": thread, "name": name, **times}
        self._events.append(event | {"args": dict(arguments)})

    def write(self, path: Path) -> None:
        """Raises `PolicyError`."""
        export_whole(path, self._text(), FLAG)

    @property
    def note(self) -> str:
        """What is missing; empty if nothing is."""
        if not self.left_out:
            return ""
        return f"cut off: the first {self._most} events, {self.left_out} more are left out"

    def _text(self) -> Iterator[str]:
        yield '{"displayTimeUnit": "ms", "otherData": ' + json.dumps({"note": self.note})
        yield ', "traceEvents": [\n'
        events = (*self._names(), *self._events)
        for number, event in enumerate(events):
            yield (",\n" if number else "") + json.dumps(event)
        yield "\n]}\n"

    def _names(self) -> Iterator[dict[str, Any]]:
        for process, name in sorted(self._machines.items()):
            yield _metadata(process, 0, "process_name", {"name": name})
            yield _metadata(process, 0, "process_sort_index", {"sort_index": process})
        for (process, row), thread in self._rows.items():
            yield _metadata(process, thread, "thread_name", {"name": row})


def _metadata(process: int, thread: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "name": name, "args": arguments}
