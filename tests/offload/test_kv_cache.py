"""Facts about the KV cache: what attention reads is what was appended, wherever the pages live."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from compression.spec import GroupFormat
from flexrun.plan import RowSpan
from flexrun.zigzag import Action, zigzag
from offload.backend import DeviceBackend
from offload.backend_cpu import CpuBackend
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.errors import OffloadStoreError
from offload.kv_cache import KVCache
from offload.kv_layout import KVGroup, build_group
from offload.kv_moves import SpanPages
from offload.links import Link
from offload.page_table import Page
from offload.paged_kv import PagedKV
from offload.pages import PagePools
from offload.ram import map_memory
from offload.staging import StagingBuffers
from offload.tiers import DISK_BLOCK, LEAVING_BATCHES, MemoryAccount, Tier
from offload.transfer_engine import TransferEngine
from tests.backends import BrokenBackend, GatedBackend, make_copies_late


@dataclass
class Shape:
    kv_heads: int
    key_dim: int
    value_dim: int


SHAPES = [Shape(2, 4, 4), Shape(1, 6, 2), Shape(3, 2, 5)]
TOKEN_BYTES = sum(4 * s.kv_heads * (s.key_dim + s.value_dim) for s in SHAPES)
STAGING = 9
TAILS = 40


class Rig:
    """A KV cache, and a dictionary of all that was ever appended to it."""

    def __init__(
        self,
        name: str,
        pages: dict[Tier, int],
        page_tokens: int,
        seed: int = 0,
        backend: DeviceBackend | None = None,
        groups: GroupFormat | None = None,
    ) -> None:
        account = MemoryAccount()
        self.backend = backend or (
            CpuBackend(account) if name == "cpu" else EmulatedBackend(account, EmulatedMachine())
        )
        self.staged = [t for t in (Tier.HOST, Tier.DISK) if pages.get(t)]
        if name == "cpu" and Tier.HOST in self.staged:
            self.staged.remove(Tier.HOST)
        most = dict.fromkeys(self.staged, STAGING)
        self.pools = PagePools(pages, page_tokens, most, TAILS, keeps_recent=groups is not None)
        self.transfers = TransferEngine(self.backend)
        if name == "emulated":
            buffers = [map_memory(DISK_BLOCK) for _ in range(3)]
            self.transfers.use_staging(StagingBuffers(buffers, self.backend))
        self.directory = TemporaryDirectory()
        try:
            self.cache = KVCache(
                SHAPES,
                torch.float32,
                self.pools,
                self.backend,
                self.transfers,
                STAGING,
                directory=Path(self.directory.name),
                groups=groups,
            )
        except BaseException:
            self.transfers.close()
            self.directory.cleanup()
            raise
        self.lengths: Counter[int] = Counter()
        self.truth: dict[tuple[int, int], torch.Tensor] = {}
        self.draw = random.Random(seed)
        self.random = torch.Generator().manual_seed(seed)
        self.expected: dict[Link, int] = defaultdict(int)

    def sweep(self, micro_batches: list[list[RowSpan]]) -> None:
        """Append random rows in zig-zag order, and check all that attention would read."""
        self.cache.begin(micro_batches)
        for step in zigzag(len(SHAPES), len(micro_batches)):
            if step.unit >= len(SHAPES):
                continue
            if step.action is Action.FETCH_KV:
                self.cache.fetch(step.unit, step.micro_batch)
            elif step.action is Action.COMPUTE:
                self.append_and_check(step.unit, step.micro_batch, micro_batches[step.micro_batch])
            elif step.action is Action.STORE_KV:
                self.cache.store(step.unit, step.micro_batch)
        for span in (span for spans in micro_batches for span in spans):
            self.lengths[span.sequence] = span.end
            self._expect_moves(span)

    def _expect_moves(self, span: RowSpan) -> None:
        """Whole pages with content come; new rows, or from DISK pages that got some, go back."""
        tokens = self.pools.page_tokens
        table = self.pools.tables[span.sequence].pages
        for index, page in enumerate(table[: self.pools.pages_for(span.end)]):
            first, last = index * tokens, (index + 1) * tokens
            content = tokens if first < span.start else 0
            new = max(0, min(span.end, last) - max(span.start, first))
            if page.tier is Tier.HOST and page.tier in self.staged:
                self._expect({Link.HOST_TO_DEVICE: content, Link.DEVICE_TO_HOST: new})
            elif page.tier is Tier.DISK:
                full, complete = last <= span.start, new and last <= span.end
                self._expect({self.backend.disk_in: tokens if full else 0})
                self._expect({Link.HOST_TO_DISK: tokens if complete else 0})
                if not self.backend.unified:
                    self._expect({Link.HOST_TO_DEVICE: content})
                    self._expect({Link.DEVICE_TO_HOST: tokens if new else 0})

    def _expect(self, tokens: dict[Link, int]) -> None:
        for link, count in tokens.items():
            self.expected[link] += count * TOKEN_BYTES

    def append_and_check(self, layer: int, number: int, spans: list[RowSpan]) -> None:
        shape, rows = SHAPES[layer], sum(span.length for span in spans)
        key = torch.randn(shape.kv_heads, rows, shape.key_dim, generator=self.random)
        value = torch.randn(shape.kv_heads, rows, shape.value_dim, generator=self.random)
        self.cache.append(layer, number, key, value)
        by_row, row = {}, 0
        for span in spans:
            new = torch.cat([key, value], 2)[:, row : row + span.length].transpose(0, 1)
            old = self.truth.get((layer, span.sequence), new[:0])
            self.truth[layer, span.sequence] = torch.cat([old[: span.start], new])
            by_row[row] = span
            row += span.length
        self.check(layer, number, by_row)

    def check(self, layer: int, number: int, by_row: dict[int, RowSpan]) -> None:
        """All that attention would read."""
        seen = []
        for group, pool in self.cache.view(layer, number):
            seen += check_group(group, pool, by_row, lambda s: self.truth[layer, s])
        wanted = [
            (row, index)
            for row, span in by_row.items()
            for index in range(self.pools.pages_for(span.end))
        ]
        assert sorted(seen) == sorted(wanted), "every page is read once"

    def close(self) -> None:
        self.transfers.close()
        self.cache.close()
        assert not list(Path(self.directory.name).iterdir()), "a file was left behind"
        self.directory.cleanup()


def check_group(
    group: KVGroup, pool: PagedKV, by_row: dict[int, RowSpan], truth
) -> list[tuple[int, int]]:
    """The pages hold their sequences' keys and values; returns each span's row and page index."""
    seen = []
    for place in group.spans:
        span = by_row[place.row]
        assert (place.start, place.end) == (span.start, span.end)
        pages = torch.tensor(place.pages)
        both = torch.cat([pool.keys[pages], pool.values[pages]], 3)  # [P, heads, tokens, dims]
        gathered = torch.cat(pool.gather(pages.unsqueeze(0)), 3)[0].transpose(0, 1)
        assert torch.equal(gathered, both.transpose(1, 2).flatten(0, 1))
        tokens, whole = pool.keys.shape[2], truth(span.sequence)
        for page, index in zip(both.transpose(1, 2), place.indices, strict=True):
            wanted = whole[index * tokens : (index + 1) * tokens]
            assert torch.equal(page[: len(wanted)], wanted)
            seen.append((place.row, index))
    return seen


CAPACITIES = [
    ("cpu", {Tier.DEVICE: 40}),
    ("cpu", {Tier.DEVICE: 20, Tier.HOST: 20}),
    ("emulated", {Tier.DEVICE: 40}),
    ("emulated", {Tier.HOST: 40}),
    ("emulated", {Tier.DEVICE: 20, Tier.HOST: 20}),
    ("cpu", {Tier.DISK: 40}),
    ("cpu", {Tier.DEVICE: 20, Tier.DISK: 20}),
    ("emulated", {Tier.DISK: 40}),
    ("emulated", {Tier.DEVICE: 20, Tier.HOST: 20, Tier.DISK: 20}),
]
every_capacity = pytest.mark.parametrize(
    ("name", "pages"), CAPACITIES, ids=[f"{n}-{'-'.join(p)}" for n, p in CAPACITIES]
)


def random_batches(rig: Rig) -> list[list[RowSpan]]:
    """Some running sequences get a row or a chunk, cut into micro-batches that staging can hold."""
    batches: list[list[RowSpan]] = [[]]
    staged: Counter[Tier] = Counter()
    for sequence, table in sorted(rig.pools.tables.items()):
        start, room = rig.lengths[sequence], table.tokens
        length = min(rig.draw.choice([0, 1, 1, 1, 2, 7]), room - start)
        if not length:
            continue
        used = table.pages[: rig.pools.pages_for(start + length)]
        pages = Counter(page.tier for page in used if page.tier in rig.staged)
        too_many = any(staged[tier] + count > STAGING for tier, count in pages.items())
        if (too_many or rig.draw.random() < 0.3) and batches[-1]:
            batches.append([])
            staged.clear()
        staged.update(pages)
        batches[-1].append(RowSpan(sequence, start, length, wants_logits=True))
    return [batch for batch in batches if batch]


def fork_some(rig: Rig, number: int) -> int:
    """Some sequences get a child that begins like them; the number of the next sequence."""
    for parent in list(rig.pools.tables):
        if rig.lengths[parent] and rig.draw.random() < 0.2:
            wanted = rig.draw.randint(1, rig.lengths[parent])
            tokens = rig.pools.fork(parent, number, wanted, rig.lengths[parent])
            if not tokens:
                continue
            if not rig.pools.allocate(number, tokens + rig.draw.randint(1, 9)):
                rig.pools.release(number)
                continue
            rig.lengths[number] = tokens
            for layer in range(len(SHAPES)):
                rig.truth[layer, number] = rig.truth[layer, parent][:tokens]
            number += 1
    return number


def move_some(rig: Rig) -> int:
    """Some full pages move to another tier; how many."""
    full: dict[Page, bool] = {}
    for sequence, table in rig.pools.tables.items():
        for index, page in enumerate(table.pages):
            there = rig.lengths[sequence] >= (index + 1) * rig.pools.page_tokens
            full[page] = full.get(page, True) and there
    pages = [page for page, there in full.items() if there]
    wanted: dict[Page, Tier] = {}
    for page in rig.draw.sample(pages, min(3, len(pages))):
        tier = rig.draw.choice(list(rig.pools.capacity))
        if not (page.tier is Tier.DEVICE and tier is Tier.DISK and not rig.backend.unified):
            wanted[page] = tier
    return len(rig.pools.move(wanted))


def random_sweeps(rig: Rig, count: int, *, sharing: bool = False) -> int:
    """Sequences come, grow and leave, and take each other's pages; returns those that moved."""
    number = sweeps = moved = 0
    while sweeps < count:
        rig.pools.settle()
        if sharing:
            moved += move_some(rig)
            number = fork_some(rig, number)
        for sequence in list(rig.pools.tables):
            if rig.draw.random() < 0.1:
                rig.pools.release(sequence)  # its pages are reused by the next one
        for sequence, table in list(rig.pools.tables.items()):
            if rig.draw.random() < 0.3:
                tokens = len(table.pages) * rig.pools.page_tokens + rig.draw.randint(1, 9)
                rig.pools.allocate(sequence, tokens)  # to grow, if there are pages left
        while rig.pools.allocate(number, rig.draw.randint(1, 8 * rig.pools.page_tokens)):
            number += 1
        if batches := random_batches(rig):
            rig.sweep(batches)
            sweeps += 1
    return moved


@every_capacity
@pytest.mark.parametrize("page_tokens", [1, 4, 5])
@pytest.mark.parametrize("seed", range(4))
def test_attention_reads_what_was_appended(name, pages, page_tokens, seed):
    """In thirty random sweeps all reads are exact; only host pages that have content move."""
    rig = Rig(name, pages, page_tokens, seed)
    random_sweeps(rig, 30)
    rig.close()
    moved = {link: counters.total_bytes for link, counters in rig.transfers.counters.items()}
    assert {link: n for link, n in moved.items() if n} == rig.expected
    assert bool(rig.expected) == bool(rig.staged)
    assert set(rig.backend.account.used.values()) == {0}


@every_capacity
@pytest.mark.parametrize(("late", "seed"), [(False, 0), (False, 1), (True, 2)])
def test_shared_and_moved_pages_hold_what_was_appended(name, pages, seed, late, monkeypatch):
    """Forks, copies before writing and moves between tiers, whenever their bytes arrive."""
    if late:
        monkeypatch.setattr("tests.backends.SHARE", 0.4)
        monkeypatch.setattr("tests.backends.SECONDS", 0.02)
        make_copies_late(monkeypatch, seed)
    rig = Rig(name, pages, page_tokens=4, seed=seed)
    moved = random_sweeps(rig, 20 if late else 40, sharing=True)
    assert (moved > 0) == (len(pages) > 1)
    rig.close()
    assert set(rig.backend.account.used.values()) == {0}


@pytest.mark.parametrize(
    ("name", "pages"),
    # Nothing else moves.
    [(n, p) for n, p in CAPACITIES if Tier.DISK in p or (n == "emulated" and Tier.HOST in p)],
)
@pytest.mark.parametrize("seed", range(3))
def test_late_copies_change_nothing(name, pages, seed, monkeypatch):
    """Rows of sweeps long past that are still on their way spoil no page, whoever has it now."""
    make_copies_late(monkeypatch, seed)
    rig = Rig(name, pages, page_tokens=4, seed=seed)
    random_sweeps(rig, 15)
    rig.close()


@every_capacity
def test_pools_are_charged(name, pages):
    """DEVICE pools of an accelerator are charged whole; pages in RAM when a sequence takes them.

    A file for pages on DISK is charged whole, and so are staging and pages that are not full.
    """
    rig = Rig(name, pages, page_tokens=4)
    page_bytes, account = 4 * TOKEN_BYTES, rig.backend.account
    widest = 4 * 4 * max(s.kv_heads * (s.key_dim + s.value_dim) for s in SHAPES)
    staging = STAGING * widest * len(rig.staged)
    empty = dict.fromkeys(Tier, 0)
    empty[Tier.DEVICE] = 2 * staging
    if name == "emulated":
        empty[Tier.DEVICE] += pages.get(Tier.DEVICE, 0) * page_bytes
        empty[Tier.HOST] = 4 * staging
    if Tier.DISK in pages:
        empty[Tier.HOST if name == "emulated" else Tier.DEVICE] += TAILS * page_bytes
        sizes = [4 * 4 * s.kv_heads * (s.key_dim + s.value_dim) for s in SHAPES]
        blocks = sum(-(-pages[Tier.DISK] * size // DISK_BLOCK) for size in sizes)
        empty[Tier.DISK] = blocks * DISK_BLOCK
    assert account.used == empty
    assert rig.pools.allocate(0, 9)
    for page in rig.pools.tables[0].pages:
        empty[page.tier] += page_bytes if page.tier in rig.backend.lazy else 0
    assert account.used == empty
    rig.close()
    assert set(account.used.values()) == {0}


def test_a_page_holds_keys_then_values():
    """A page is one piece of memory, keys before values; a slot without a token holds zeros."""
    rig = Rig("cpu", {Tier.DEVICE: 3}, page_tokens=2)
    rig.pools.allocate(0, 4)
    rig.cache.begin([[RowSpan(0, 0, 3, True)]])
    key, value = torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)
    rig.cache.append(0, 0, key, value)
    ((_, pool),) = rig.cache.view(0, 0)
    first, second = (page.number for page in rig.pools.tables[0].pages)
    assert pool.raw[first].tolist() == [1.0] * 16 + [2.0] * 16
    assert pool.raw[second].tolist() == ([1.0] * 4 + [0.0] * 4) * 2 + ([2.0] * 4 + [0.0] * 4) * 2
    assert pool.keys.data_ptr() == pool.raw.data_ptr()
    rig.close()


def test_a_lost_row_is_not_silent():
    """If new keys and values could not be stored, a later layer fails, not a later read."""
    rig = Rig("emulated", {Tier.HOST: 9 * 3}, page_tokens=4)
    rig.transfers.close()
    rig.transfers = TransferEngine(BrokenBackend(Link.DEVICE_TO_HOST))
    rig.cache._staged[Tier.HOST]._transfers = rig.transfers
    for sequence in range(3):
        rig.pools.allocate(sequence, 9)
    with pytest.raises(OffloadStoreError, match="the link is broken"):
        rig.sweep([[RowSpan(sequence, 0, 1, True)] for sequence in range(3)])
    rig.close()


def test_rows_on_their_way_to_host_are_bounded(monkeypatch):
    """However slow the link, the device holds the new rows of a few micro-batches only."""
    rig = Rig("emulated", {Tier.HOST: 36}, page_tokens=4)
    assert isinstance(rig.backend, EmulatedBackend)
    rig.backend.machine = EmulatedMachine(speeds={Link.DEVICE_TO_HOST: 50_000})
    sent, waiting = [], []
    submit = rig.transfers.submit

    def noted(link, *arguments, **options):
        transfer = submit(link, *arguments, **options)
        if link is Link.DEVICE_TO_HOST:
            sent.append(transfer)
            waiting.append(sum(not each.issued for each in sent))
        return transfer

    monkeypatch.setattr(rig.transfers, "submit", noted)
    for sequence in range(4):
        rig.pools.allocate(sequence, 20)
    rig.sweep([[RowSpan(sequence, 0, 9, True)] for sequence in range(4)])
    assert len(sent) == 12
    assert max(waiting) == LEAVING_BATCHES
    rig.close()


@pytest.mark.parametrize("micro_batches", [2, 3, 5])
def test_rows_on_their_way_to_host_keep_apart(micro_batches):
    """On a slow link the rows of several micro-batches wait for their staging; none is mixed up."""
    sequences = range(micro_batches)
    rig = Rig("emulated", {Tier.HOST: 9 * micro_batches}, page_tokens=4)
    assert isinstance(rig.backend, EmulatedBackend)
    rig.backend.machine = EmulatedMachine(speeds={Link.DEVICE_TO_HOST: 100_000})
    for sequence in sequences:
        rig.pools.allocate(sequence, 20)
    for start, length in ((0, 9), (9, 1), (10, 1), (11, 3)):
        rig.sweep([[RowSpan(sequence, start, length, True)] for sequence in sequences])
    rig.close()


def test_a_page_keeps_the_rows_of_its_last_owner():
    """Rows that are stored late do not spoil a page that another sequence has got meanwhile."""
    backend = GatedBackend(Link.DEVICE_TO_HOST, held=1)
    rig = Rig("emulated", {Tier.HOST: 9}, page_tokens=4, backend=backend)
    assert rig.pools.allocate(0, 6)
    pages = set(rig.pools.tables[0].pages)
    rig.sweep([[RowSpan(0, 0, 6, True)]])  # of layer 1, through the second staging, nothing leaves
    rig.pools.release(0)
    for sequence in (1, 2):
        assert rig.pools.allocate(sequence, 8)
    assert pages == set(rig.pools.tables[1].pages)
    # Nothing is fetched in this sweep, which would wait for what is stored.
    spans = [[RowSpan(1, 0, 6, True)], [RowSpan(2, 0, 6, True)]]
    sweep = threading.Thread(target=rig.sweep, args=(spans,))
    sweep.start()
    sweep.join(0.2)
    assert sweep.is_alive(), "the device would fill up with rows"
    backend.gate.set()
    sweep.join()
    rig.sweep([[RowSpan(1, 6, 1, True)], [RowSpan(2, 6, 1, True)]])
    rig.close()


def decode_at(row: int, end: int) -> SpanPages:
    """One row at the end of a sequence with pages of four tokens."""
    count = -(-end // 4)
    return SpanPages(row, end - 1, end, range(500, 500 + count), range(count))


def test_decodes_of_similar_length_are_batched():
    """In a batch no sequence has over a quarter more pages than the shortest, or one more."""
    ends = [1, 3, 4, 5, 9, 20, 80, 81, 96, 100, 101, 128]
    spans = [decode_at(row, end) for row, end in enumerate(ends)]
    group = build_group(spans, 4, torch.device("cpu"), Tier.DEVICE, staged=False)
    lengths = [batch.lengths.tolist() for batch in group.decodes()]
    assert lengths == [[1, 3, 4, 5], [9], [20], [80, 81, 96, 100], [101, 128]]
    assert [batch.pages.shape[1] for batch in group.decodes()] == [2, 3, 5, 25, 32]
    assert not group.chunks(fewest=2)


@pytest.mark.parametrize("limit", [1, 40, 100, 10_000])
def test_a_decode_batch_is_bounded(limit):
    """Batches of several sequences gather no more than so many positions, padding included."""
    spans = [decode_at(row, end) for row, end in enumerate(range(3, 40))]
    group = build_group(
        spans, 4, torch.device("cpu"), Tier.DEVICE, staged=False, gathered_tokens=limit
    )
    for batch in group.decodes():
        assert len(batch.rows) == 1 or batch.pages.numel() * 4 <= limit
    assert sorted(row for batch in group.decodes() for row in batch.rows.tolist()) == list(
        range(37)
    )
    assert (len(group.decodes()) == 37) == (limit == 1)


def test_what_staging_held_before_is_not_read():
    """Values that are no numbers, left in staging, are gone from the pages in use."""
    rig = Rig("emulated", {Tier.HOST: 9}, page_tokens=4)
    rig.pools.allocate(0, 9)
    for staging in rig.cache._staged[Tier.HOST].stagings:
        staging.device.fill_(float("nan"))
    for start, length in ((0, 3), (3, 1), (4, 1), (5, 4)):
        span = RowSpan(0, start, length, True)
        rig.cache.begin([[span]])
        for layer, shape in enumerate(SHAPES):
            rig.cache.fetch(layer, 0)
            key, value = (
                torch.ones(shape.kv_heads, length, 1),
                torch.ones(shape.kv_heads, length, 1),
            )
            rig.cache.append(
                layer, 0, key.expand(-1, -1, shape.key_dim), value.expand(-1, -1, shape.value_dim)
            )
            ((group, pool),) = rig.cache.view(layer, 0)
            assert pool.raw[: group.num_staged].isfinite().all()
            rig.cache.store(layer, 0)
    rig.close()


@pytest.mark.parametrize("name", ["cpu", "emulated"])
@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST])
def test_an_erased_sequence_leaves_zeros(name, tier):
    """The pages of a sequence whose values are no numbers hold zeros for the one that is next."""
    rig = Rig(name, {tier: 9}, page_tokens=4)
    for sequence in (0, 1):
        rig.pools.allocate(sequence, 9)
    rig.sweep([[RowSpan(0, 0, 9, True)], [RowSpan(1, 0, 9, True)]])
    rig.cache.erase(0)
    rig.cache.erase(2)  # one that never ran
    for layer in range(len(SHAPES)):
        home = rig.cache._layers[tier][layer].raw
        erased, kept = (rig.pools.tables[number].by_tier(3)[tier][0] for number in (0, 1))
        assert not home[erased].any()
        assert home[kept].any(1).all()
    rig.close()


def test_an_erased_sequence_leaves_zeros_where_its_pages_were():
    """A page that moved up has left a copy behind, which others get next."""
    rig = Rig("emulated", {Tier.DEVICE: 4, Tier.HOST: 4}, page_tokens=4)
    assert rig.pools.allocate(0, 8)
    rig.sweep([[RowSpan(0, 0, 8, True)]])
    (source,) = (page for page in rig.pools.tables[0].pages if page.tier is Tier.HOST)
    assert rig.pools.move({source: Tier.DEVICE}) == [source]
    assert rig.pools.allocate(0, 9)
    rig.sweep([[RowSpan(0, 8, 1, True)]])
    rig.transfers.drain()
    left = [pool.raw[source.number] for pool in rig.cache._layers[Tier.HOST]]
    assert all(each.any() for each in left)
    rig.cache.erase(0)
    assert not any(each.any() for each in left)
    rig.close()


@pytest.mark.parametrize("name", ["cpu", "emulated"])
def test_no_room_for_the_file_is_an_error_that_leaves_nothing(name, monkeypatch):
    """If the pages on disk cannot be reserved, that is said, and all memory is given back."""
    accounts = []

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    real = MemoryAccount.charge

    def noted(account: MemoryAccount, *arguments: Any) -> None:
        accounts.append(account)
        real(account, *arguments)

    monkeypatch.setattr(MemoryAccount, "charge", noted)
    with pytest.raises(OffloadStoreError, match="reserving") as caught:
        Rig(name, {Tier.HOST: 3, Tier.DISK: 3}, page_tokens=4)
    assert "--offload-dir" in str(caught.value)
    assert accounts
    assert set(accounts[0].used.values()) == {0}


@pytest.mark.parametrize("broken", [Link.HOST_TO_DISK, Link.DISK_TO_HOST])
def test_a_broken_disk_is_not_silent(broken, monkeypatch):
    """A page that was not written, or cannot be read, is an error when it is needed next."""
    rig = Rig("emulated", {Tier.DISK: 9}, page_tokens=4)
    assert rig.pools.allocate(0, 20)
    rig.sweep([[RowSpan(0, 0, 9, True)]])
    rig.transfers.drain()
    copy = EmulatedBackend.copy

    def failing(self, link, *arguments, **options):
        if link is broken:
            raise OffloadStoreError("the disk is broken")
        return copy(self, link, *arguments, **options)

    monkeypatch.setattr(EmulatedBackend, "copy", failing)

    def go_on() -> None:
        for start in range(9, 18):
            rig.sweep([[RowSpan(0, start, 1, True)]])

    with pytest.raises(OffloadStoreError, match="the disk is broken"):
        go_on()
    rig.close()


def test_neighbouring_pages_are_read_at_once():
    """A sequence that got neighbouring pages costs one request a layer, however long it is."""
    rig = Rig("cpu", {Tier.DISK: 40}, page_tokens=4)
    for sequence in range(2):
        assert rig.pools.allocate(sequence, 33)
    rig.sweep([[RowSpan(0, 0, 32, True)], [RowSpan(1, 0, 30, True)]])
    rig.transfers.drain()
    rig.cache.begin([[RowSpan(0, 32, 1, True)], [RowSpan(1, 30, 1, True)]])
    for number, full in ((0, 8), (1, 7)):
        (group,) = rig.cache._batches[number].groups
        assert group.on_disk is not None
        assert [run.count for run in group.on_disk.read] == [full]
    rig.close()
