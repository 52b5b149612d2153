"""Facts about the processor's attention as it is measured."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch

from flexrun.attention_speed import measured_speed
from flexrun.model_trace import AttentionShape
from offload.paged_kv import PagedKV

SHAPE = AttentionShape(query_heads=4, kv_heads=2, key_dim=32, value_dim=32)
PAGES, PAGE_TOKENS = 40, 16


class CountingAttention:
    """Keeps how many pages it was to attend to; takes half a second, beside others a whole one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.pages: list[int] = []

    def attend(self, query: torch.Tensor, spans: Any, *_: Any) -> None:
        self.pages.append(len(set(spans.pages.tolist())))
        alone = threading.current_thread() is threading.main_thread()
        self._clock.pass_seconds(0.5 if alone else 1.0)


class Clock(threading.local):
    """`time.perf_counter` of a test, which stands still in a thread that does not work."""

    def __init__(self) -> None:
        self.now = 0.0

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


def pages() -> PagedKV:
    return PagedKV.of(torch.ones(PAGES * 2 * PAGE_TOKENS * 2 * 32), SHAPE, PAGE_TOKENS)


def test_every_page_is_attended_to_and_counted(clock):
    """Bytes of all pages over the seconds of a call; without compute nothing contends."""
    attention: Any = CountingAttention(clock)
    pool = pages()
    assert measured_speed(attention, pool, SHAPE) == (pool.raw.nbytes / 0.5, 0.0)
    assert set(attention.pages) == {PAGES}


def test_what_goes_wrong_beside_compute_is_said(clock):
    """The thread that attends fails after the calls that are made alone."""

    class FailingAttention(CountingAttention):
        def attend(self, query: torch.Tensor, spans: Any, *others: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                raise MemoryError("no room for sums")
            super().attend(query, spans, *others)

    attention: Any = FailingAttention(clock)
    with pytest.raises(MemoryError, match="no room for sums"):
        measured_speed(attention, pages(), SHAPE, partial(clock.pass_seconds, 0.1))


def test_contention_is_what_both_lose_on_average(clock):
    """Beside compute attention runs at half its speed, and compute as fast as before."""
    attention: Any = CountingAttention(clock)
    pool = pages()
    speed = measured_speed(attention, pool, SHAPE, partial(clock.pass_seconds, 0.1))
    assert speed.bytes_per_second == pool.raw.nbytes / 0.5
    assert speed.contention == pytest.approx(0.25)
