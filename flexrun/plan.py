"""What one sweep computes, as plain data (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class RowSpan(NamedTuple):
    """Rows of one sequence in a sweep: its positions `start` to `start + length`."""

    sequence: int
    start: int
    length: int
    wants_logits: bool
    """The last row is the sequence's newest token: its logits choose the next one."""
    drafts: int = 0
    """Rows at the end of `length`, of tokens that are guessed to follow. Each gives logits, too,
    and is right if the row before it chooses it."""

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


@dataclass(slots=True)
class SweepRows:
    """The rows of a sweep that is being put together."""

    most: int
    """Rows that it may have."""
    spans: list[RowSpan] = field(default_factory=list)
    rows: int = 0
    left: int = field(init=False)
    """Rows that may still be added."""

    def __post_init__(self) -> None:
        self.left = self.most

    def add(self, span: RowSpan) -> None:
        self.spans.append(span)
        self.left -= span.length
        self.rows += span.length

    def limit(self, rows: int) -> None:
        """At most so many, or what it has already."""
        self.left = max(0, min(self.left, rows - self.rows))
