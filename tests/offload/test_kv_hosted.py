"""Facts about which rows attend to their pages on HOST there."""

from __future__ import annotations

import random

import pytest
import torch

from offload.kv_hosted import hosted_rows, split_spans
from offload.kv_moves import SpanPages

PLENTY = 1 << 30


def make_spans(seed: int, chunks: bool = True) -> list[SpanPages]:
    draw = random.Random(seed)
    spans, row, page = [], 0, 0
    for _ in range(40):
        pages = draw.randint(1, 30)
        rows = draw.choice([1, 1, 1, 7]) if chunks else 1
        end = 32 * pages
        spans.append(SpanPages(row, end - rows, end, range(page, page + pages), range(pages)))
        row, page = row + rows, page + pages
    return spans


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_share_is_met(seed: int, share: float) -> None:
    """In pages, to within the longest sequence; rows of prompts never stay."""
    spans = make_spans(seed)
    hosted, moved = split_spans(spans, share, PLENTY)
    assert sorted(map(id, hosted + moved)) == sorted(map(id, spans))
    assert all(span.count == 1 for span in hosted)
    for part in (hosted, moved):
        assert [span.row for span in part] == sorted(span.row for span in part)
    single = sum(len(span.pages) for span in spans if span.count == 1)
    assert abs(sum(len(span.pages) for span in hosted) - share * single) <= 30
    if share in (0.0, 1.0):
        assert sum(len(span.pages) for span in hosted) == share * single


@pytest.mark.parametrize("seed", range(5))
def test_what_does_not_fit_into_staging_stays(seed: int) -> None:
    spans = make_spans(seed, chunks=False)
    for room in (0, 10, 100, 400):
        _, moved = split_spans(spans, 0.0, room)
        assert sum(len(span.pages) for span in moved) <= room


def test_rows_are_numbered_anew() -> None:
    """Pages keep their numbers in the pool; new rows are stored only where the last page is."""
    spans = [
        SpanPages(3, 40, 41, [7, 9], [0, 1]),
        SpanPages(8, 70, 71, [5], [1], newest=False),  # its last page is on another tier
    ]
    found = hosted_rows(spans, 32, torch.device("cpu"))
    assert found is not None
    assert found.rows.tolist() == [3, 8]
    assert found.pages == 3
    assert found.group.rows.tolist() == [0]
    assert (found.group.slots.pages.tolist(), found.group.slots.offsets.tolist()) == ([9], [8])
    table = found.group.paged()
    assert table is not None
    assert table.pages.tolist() == [7, 9, 5]
    assert table.indices.tolist() == [0, 1, 1]
    assert hosted_rows([], 32, torch.device("cpu")) is None
