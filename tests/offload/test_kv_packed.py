"""Pages in groups of few bits: full ones are packed, newest ones are exact, wherever they live."""

from __future__ import annotations

import pytest
import torch

from compression.expansion import quantize_unchecked
from compression.rotation import rotated
from compression.spec import GroupFormat
from flexrun.plan import RowSpan
from offload.kv_layout import KVGroup
from offload.links import Link
from offload.paged_kv import KVFormat, PagedKV
from offload.tiers import PACKED_PAGES, Tier
from tests.backends import make_copies_late
from tests.offload import test_kv_cache
from tests.offload.test_kv_cache import (
    SHAPES,
    Rig,
    Shape,
    every_capacity,
    random_sweeps,
)

FORMAT = GroupFormat(4, 32)
STORED = KVFormat(torch.float32, FORMAT)
TOKEN_BYTES = sum(STORED.page_bytes(shape, 1) for shape in SHAPES)


class PackedRig(Rig):
    """The same with packed pages: their bytes follow from what was appended."""

    def __init__(self, name: str, pages: dict[Tier, int], page_tokens: int, seed: int = 0) -> None:
        super().__init__(name, pages, page_tokens, seed, groups=FORMAT)

    def check(self, layer: int, number: int, by_row: dict[int, RowSpan]) -> None:
        seen = []
        for group, pool in self.cache.view(layer, number):
            packed = pool.format.groups is not None
            look = self._packed_pages if packed else self._newest_pages
            seen += look(layer, group, pool, by_row)
        tokens = self.pools.page_tokens
        wanted = [
            (row, index)
            for row, span in by_row.items()
            for index in range(span.start // tokens + 1)
        ]
        assert sorted(seen) == sorted(wanted), "every page is read once"

    def _packed_pages(
        self, layer: int, group: KVGroup, pool: PagedKV, by_row: dict[int, RowSpan]
    ) -> list[tuple[int, int]]:
        seen, tokens = [], self.pools.page_tokens
        assert not len(group.rows)
        for place in group.spans:
            truth = self.truth[layer, by_row[place.row].sequence]
            for page, index in zip(place.pages, place.indices, strict=True):
                values = truth[index * tokens : (index + 1) * tokens]
                centre = self._centre(layer, by_row[place.row].sequence)
                wanted = packed_page(values - centre, SHAPES[layer])
                assert torch.equal(pool.raw[page], wanted)
                seen.append((place.row, index))
        return seen

    def _centre(self, layer: int, sequence: int) -> torch.Tensor:
        """[heads, dims] of a sequence's keys and values, once it was checked."""
        recent, table = self.cache._recent, self.pools.tables[sequence]
        assert recent is not None
        centres = recent.centres[layer]
        both = torch.cat([centres.keys[table.tail], centres.values[table.tail]], 2).squeeze(1)
        first = self.truth[layer, sequence][: self.pools.page_tokens]
        torch.testing.assert_close(both, first[min(1, len(first) - 1) :].mean(0))
        return both

    def _newest_pages(
        self, layer: int, group: KVGroup, pool: PagedKV, by_row: dict[int, RowSpan]
    ) -> list[tuple[int, int]]:
        seen, tokens = [], self.pools.page_tokens
        for place in group.spans:
            truth = self.truth[layer, by_row[place.row].sequence]
            for page, index in zip(place.pages, place.indices, strict=True):
                first, end = index * tokens, min(place.end, (index + 1) * tokens)
                both = torch.cat([pool.keys[page], pool.values[page]], 2).transpose(0, 1)
                assert torch.equal(both[: end - first], truth[first:end])
                seen.append((place.row, index))
        return seen

    def _expect_moves(self, span: RowSpan) -> None:
        """Full pages come, and those that become full go."""
        tokens = self.pools.page_tokens
        for index, page in enumerate(self.pools.tables[span.sequence].pages):
            packed = index > 0  # the first page stays as it is, on the device
            full = tokens * (packed and (index + 1) * tokens <= span.start)
            filled = tokens * (packed and span.start < (index + 1) * tokens <= span.end)
            backend = self.backend
            if page.tier is Tier.HOST and page.tier in self.staged:
                self._expect_packed(Link.HOST_TO_DEVICE, full)
                self._expect_packed(Link.DEVICE_TO_HOST, filled)
            elif page.tier is Tier.DISK:
                self._expect_packed(backend.disk_in, full)
                self._expect_packed(Link.HOST_TO_DISK, filled)
                if not backend.unified:
                    self._expect_packed(Link.HOST_TO_DEVICE, full)
                    self._expect_packed(Link.DEVICE_TO_HOST, filled)

    def _expect_packed(self, link: Link, tokens: int) -> None:
        self.expected[link] += tokens * TOKEN_BYTES


def packed_page(values: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A page of values [tokens, heads, key_dim + value_dim]: each row by itself."""
    sides = values.transpose(0, 1).split([shape.key_dim, shape.value_dim], 2)
    return torch.cat(
        [
            quantize_unchecked(rotated(side.reshape(-1, side.shape[-1])), FORMAT).view(-1)
            for side in sides
        ]
    )


@every_capacity
@pytest.mark.parametrize(("page_tokens", "at_a_time"), [(1, PACKED_PAGES), (4, 2), (5, 3)])
def test_attention_reads_what_was_appended(name, pages, page_tokens, at_a_time, monkeypatch):
    """In random sweeps full pages are packed once, and only packed bytes cross links."""
    monkeypatch.setattr("offload.kv_recent.PACKED_PAGES", at_a_time)
    seed = at_a_time % 3
    rig = PackedRig(name, pages, page_tokens, seed)
    random_sweeps(rig, 20)
    rig.close()
    moved = {link: counters.total_bytes for link, counters in rig.transfers.counters.items()}
    assert {link: n for link, n in moved.items() if n} == {
        link: n for link, n in rig.expected.items() if n
    }
    assert set(rig.backend.account.used.values()) == {0}


@every_capacity
@pytest.mark.parametrize(("late", "seed"), [(False, 0), (True, 2)])
def test_shared_and_moved_pages_hold_what_was_appended(name, pages, seed, late, monkeypatch):
    """Forks begin with exact values or with full pages only; packed pages move as they are."""
    if late:
        monkeypatch.setattr("tests.backends.SHARE", 0.4)
        monkeypatch.setattr("tests.backends.SECONDS", 0.02)
        make_copies_late(monkeypatch, seed)
    rig = PackedRig(name, pages, page_tokens=4, seed=seed)
    moved = random_sweeps(rig, 15 if late else 30, sharing=True)
    assert (moved > 0) == (len(pages) > 1)
    rig.close()
    assert set(rig.backend.account.used.values()) == {0}


def test_a_fork_of_a_page_that_was_packed_begins_before_it():
    """Its rows are computed again: their exact values are gone."""
    rig = PackedRig("cpu", {Tier.DEVICE: 20}, page_tokens=4)
    assert rig.pools.allocate(0, 10)
    rig.sweep([[RowSpan(0, 0, 10, wants_logits=True)]])
    assert rig.pools.fork(0, 1, 10, 10) == 10, "the last page is the parent's newest"
    assert rig.pools.fork(0, 2, 7, 10) == 4
    assert rig.pools.fork(0, 3, 3, 10) == 3, "the first page is exact"
    rig.close()


def test_sequences_without_a_tail_wait():
    """Each sequence needs one, from its first page to its end."""
    rig = PackedRig("cpu", {Tier.DEVICE: 200}, page_tokens=4)
    tails = test_kv_cache.TAILS
    assert all(rig.pools.allocate(number, 1) for number in range(tails))
    assert not rig.pools.allocate(tails, 1)
    rig.pools.release(7)
    assert rig.pools.allocate(tails, 1)
    rig.close()
