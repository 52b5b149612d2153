"""What one sweep computes, as plain data (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class RowSpan(NamedTuple):
    """Rows of one sequence in a sweep: its positions `start` to `start + length`."""

    sequence: int
    start: int
    length: int
    wants_logits: bool
    """The last row is the sequence's newest token: its logits choose the next one."""

    @property
    def end(self) -> int:
        """Positions that are in the KV cache after the sweep."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows computed together in one layer call, packed without padding."""

    spans: tuple[RowSpan, ...]

    @property
    def rows(self) -> int:
        return sum(span.length for span in self.spans)


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """The micro-batches of one pass over all layers."""

    micro_batches: tuple[MicroBatch, ...]
    last: bool = False
    """No sweep follows, whatever tokens are chosen: no weights need to be fetched ahead."""

    @property
    def spans(self) -> list[RowSpan]:
        """All of the sweep."""
        return [span for batch in self.micro_batches for span in batch.spans]

    @property
    def rows(self) -> int:
        return sum(batch.rows for batch in self.micro_batches)

    @property
    def empty(self) -> bool:
        return not self.micro_batches
