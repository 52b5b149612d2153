"""What a run did, counted: the summary's numbers."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload.tiers import MemoryAccount
    from offload.transfer import TransferEngine


@dataclass(slots=True)
class RunCounters:
    """Counters of an engine, cumulative over its life."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    sweeps: int = 0
    rows: int = 0
    load_seconds: float = 0.0
    sweep_seconds: list[float] = field(default_factory=list)

    def sweep(self, rows: int, generated: int, seconds: float) -> None:
        """One sweep is over."""
        self.sweeps += 1
        self.rows += rows
        self.generated_tokens += generated
        self.sweep_seconds.append(seconds)

    def summary(self, transfers: TransferEngine, account: MemoryAccount) -> dict[str, Any]:
        """The numbers of the final JSON object."""
        seconds = sum(self.sweep_seconds)
        links = {str(link): counters.total_bytes for link, counters in transfers.counters.items()}
        return {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "seconds": round(seconds, 3),
            "load_seconds": round(self.load_seconds, 3),
            "tokens_per_second": round(self.generated_tokens / seconds, 3) if seconds else 0.0,
            "sweeps": self.sweeps,
            "rows": self.rows,
            "sweep_seconds": round(statistics.median(self.sweep_seconds or [0.0]), 6),
            "bytes": links,
            "bytes_by_kind": {
                str(link): dict(counters.bytes)
                for link, counters in transfers.counters.items()
                if counters.bytes
            },
            "peak_bytes": {str(tier): nbytes for tier, nbytes in account.peak.items()},
        }
