"""What a run did, counted: the summary's numbers, and what bound its speed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offload.timeline import COMPUTE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload.links import Link
    from offload.tiers import MemoryAccount
    from offload.transfer_engine import TransferEngine


@dataclass(slots=True)
class RunCounters:
    """Counters of an engine, cumulative over its life."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    sweeps: int = 0
    rows: int = 0
    sequences: int = 0
    """That were running, summed over all sweeps."""
    drafted_tokens: int = 0
    """Guessed tokens that had rows, …"""
    accepted_tokens: int = 0
    """… and those of them that were right."""
    load_seconds: float = 0.0
    sweep_seconds: list[float] = field(default_factory=list)

    def sweep(self, rows: int, sequences: int, seconds: float) -> None:
        """One sweep is over."""
        self.sweeps += 1
        self.rows += rows
        self.sequences += sequences
        self.sweep_seconds.append(seconds)

    def summary(
        self, transfers: TransferEngine, account: MemoryAccount, raw: Mapping[Link, float]
    ) -> dict[str, Any]:
        """The numbers of the final JSON object; `raw` is bytes per second of idle links."""
        seconds = sum(self.sweep_seconds)
        totals = {str(link): counters.total_bytes for link, counters in transfers.counters.items()}
        shares = _busy_shares(transfers, seconds)
        return {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "seconds": round(seconds, 3),
            "load_seconds": round(self.load_seconds, 3),
            "tokens_per_second": round(self.generated_tokens / seconds, 3) if seconds else 0.0,
            "sweeps": self.sweeps,
            "rows": self.rows,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "running_sequences": round(self.sequences / self.sweeps, 2) if self.sweeps else 0.0,
            "sweep_seconds": round(statistics.median(self.sweep_seconds or [0.0]), 6),
            "bound": max(shares, key=lambda row: shares[row]) if self.sweeps else None,
            "compute_share": round(shares[COMPUTE], 4),
            "links": {
                str(link): _link(transfers, link, shares[str(link)], raw.get(link))
                for link, counters in transfers.counters.items()
                if counters.bytes
            },
            "bytes": totals,
            "bytes_by_kind": {
                str(link): dict(counters.bytes)
                for link, counters in transfers.counters.items()
                if counters.bytes
            },
            "peak_bytes": {str(tier): nbytes for tier, nbytes in account.peak.items()},
        }


def _busy_shares(transfers: TransferEngine, seconds: float) -> dict[str, float]:
    """Share of the time in which compute and each link did something."""
    rows = [COMPUTE, *map(str, transfers.counters)]
    busy = {row: transfers.timeline.busy_seconds(row) for row in rows}
    return {row: min(1.0, each / seconds) if seconds else 0.0 for row, each in busy.items()}


def _link(
    transfers: TransferEngine, link: Link, share: float, raw: float | None
) -> dict[str, float | None]:
    busy = transfers.timeline.busy_seconds(str(link))
    speed = transfers.counters[link].total_bytes / busy if busy else 0.0
    return {
        "busy_share": round(share, 4),
        "gb_per_s": round(speed / 1e9, 4),
        "raw_gb_per_s": None if raw is None else round(raw / 1e9, 4),
    }


def report_text(summary: Mapping[str, Any]) -> str:
    """What bound the run, for people; empty if nothing ran."""
    if not summary.get("bound"):
        return ""
    lines = [f"bound by {summary['bound']}"]
    lines += [f"  compute        busy {summary['compute_share']:4.0%}"]
    for name, link in summary["links"].items():
        raw = link["raw_gb_per_s"]
        against = f" of {raw:.2f} GB/s reached by a raw copy" if raw else ""
        lines.append(
            f"  {name:<14} busy {link['busy_share']:4.0%}, {link['gb_per_s']:.2f} GB/s{against}"
        )
    return "\n".join([*lines, *_foreseen(summary.get("predicted"))])


def _foreseen(predicted: Mapping[str, Any] | None) -> list[str]:
    """Predicted against measured, a line for each term."""
    if not predicted:
        return []
    rows = {"sweeps": predicted["seconds"], **predicted["terms"]}
    return ["predicted and measured seconds", *(_foreseen_line(*row) for row in rows.items())]


def _foreseen_line(name: str, pair: Mapping[str, float]) -> str:
    predicted, measured = pair["predicted"], pair["measured"]
    off = f" ({measured / predicted - 1:+.0%})" if predicted else ""
    return f"  {name:<14} {predicted:10.2f} {measured:10.2f}{off}"
