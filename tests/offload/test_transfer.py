"""Facts about the transfer engine: order, dependencies, errors and counters."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload.backend_cpu import CpuBackend
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.direct_file import DirectFile
from offload.errors import OffloadStoreError
from offload.links import FileExtent, FileRows, Link, PageSlots, TensorRows
from offload.paged_kv import KVFormat, PagedKV, TokenSlots
from offload.ram import map_memory
from offload.staging import KEPT, StagingBuffers
from offload.tiers import REQUEST_BYTES, MemoryAccount, Tier
from offload.transfer import URGENT
from offload.transfer_engine import TransferEngine
from tests.backends import BrokenBackend

IN, OUT, READ = Link.HOST_TO_DEVICE, Link.DEVICE_TO_HOST, Link.DISK_TO_HOST


class LoggingBackend(EmulatedBackend):
    """Logs every copy, and holds those of a closed link until its gate opens."""

    def __init__(self) -> None:
        super().__init__(MemoryAccount(), EmulatedMachine())
        self.gates = {link: threading.Event() for link in self.links}
        self.log: list[tuple[Link, int]] = []
        self.events: list[list[Any]] = []

    def requests_in_flight(self, link: Link) -> int:
        return 1  # so that the order is that of the queue

    def marks_of(self, event: Any) -> tuple[Any, Any]:
        return 0.0, 0.0

    def copy(self, link: Link, source: Any, target: Any, after: Any, **how: Any) -> Any:
        self.gates[link].wait()
        self.log.append((link, int(source[0])))
        self.events.append(list(after))
        super().copy(link, source, target, after, **how)
        return f"copied {int(source[0])}"


@pytest.fixture
def backend():
    return LoggingBackend()


@pytest.fixture
def engine(backend):
    engine = TransferEngine(backend)
    yield engine
    for gate in backend.gates.values():
        gate.set()
    engine.close()


def numbered(number: int) -> torch.Tensor:
    return torch.full((4,), number, dtype=torch.uint8)


def send(engine: TransferEngine, link: Link, number: int, **options: Any) -> Any:
    target = torch.zeros(4, dtype=torch.uint8)
    return engine.submit(link, numbered(number), target, kind="weights", **options)


def test_bytes_arrive():
    """A copy writes exactly the source's bytes, and is over once it was waited for."""
    engine = TransferEngine(EmulatedBackend(MemoryAccount(), EmulatedMachine()))
    source = torch.arange(200, dtype=torch.uint8)
    target = torch.zeros(200, dtype=torch.uint8)
    transfer = engine.submit(IN, source, target, kind="weights")
    transfer.synchronize()
    assert transfer.issued
    assert torch.equal(target, source)
    engine.close()


def test_a_link_works_in_order_of_priority_and_submission(engine, backend):
    """Urgent copies overtake waiting ones; equal ones keep the order they were submitted in."""
    send(engine, IN, 0)  # taken at once, held by the gate
    while len(engine._lanes[IN]):
        threading.Event().wait(0.001)
    transfers = [send(engine, IN, n, priority=p) for n, p in ((1, 1), (2, 0), (3, 1), (4, 0))]
    backend.gates[IN].set()
    for transfer in transfers:
        transfer.synchronize()
    assert [number for _, number in backend.log] == [0, 2, 4, 1, 3]


def test_what_cannot_run_yet_holds_up_nothing(engine, backend):
    """A copy overtakes an earlier and more urgent one that still waits for another link."""
    backend.gates[IN].set()
    read = send(engine, READ, 1)
    waiting = send(engine, IN, 2, after=[read], priority=0)
    send(engine, IN, 3).synchronize()
    assert not waiting.issued
    backend.gates[READ].set()
    waiting.synchronize()
    assert [number for link, number in backend.log if link is IN] == [3, 2]


def test_an_urgent_copy_gets_between_the_requests_of_a_large_one(engine, backend):
    """A large copy is cut into requests; what is more urgent waits for one of them at most."""
    slab = map_memory(3 * REQUEST_BYTES + 5)
    large = engine.submit(IN, slab, torch.empty_like(slab), kind="weights", priority=5)
    while len(engine._lanes[IN]) > 3:
        threading.Event().wait(0.001)
    urgent = send(engine, IN, 7, priority=0)
    backend.gates[IN].set()
    large.synchronize()
    urgent.synchronize()
    assert [number for _, number in backend.log] == [0, 7, 0, 0, 0]


def test_links_do_not_wait_for_each_other(engine, backend):
    """A copy on one link is over while another link is still busy."""
    backend.gates[OUT].set()
    slow = send(engine, IN, 1)
    send(engine, OUT, 2).synchronize()
    assert not slow.issued


def test_a_copy_waits_for_what_it_depends_on(engine, backend):
    """A copy on a free link starts after the transfers it depends on, and gets their events."""
    backend.gates[IN].set()
    read = send(engine, READ, 1)
    moved = send(engine, IN, 2, after=[read, "an event", None])
    assert backend.log == []
    assert not moved.issued
    backend.gates[READ].set()
    moved.synchronize()
    assert backend.log == [(READ, 1), (IN, 2)]
    assert backend.events[1] == ["an event", "copied 1"]
    assert moved.events == ["copied 2"]


def test_an_error_reaches_the_waiter():
    """Who waits for a failed copy, or for one after it, gets the error; later copies run."""
    engine = TransferEngine(BrokenBackend(READ))
    read = send(engine, READ, 1)
    dependent = send(engine, IN, 2, after=[read])
    later = send(engine, IN, 3)
    for transfer in (read, dependent):
        with pytest.raises(OffloadStoreError, match="the link is broken"):
            transfer.wait()
    later.synchronize()
    assert engine.counters[READ].total_bytes == 0
    assert engine.counters[IN].bytes == {"weights": 4}
    engine.close()


def test_bytes_are_counted_by_link_and_kind():
    """Counters hold every copy's bytes under its kind, on the link that it crossed."""
    engine = TransferEngine(EmulatedBackend(MemoryAccount(), EmulatedMachine()))
    for nbytes, kind, link in ((10, "kv", IN), (20, "weights", IN), (5, "kv", IN), (7, "kv", OUT)):
        source = torch.zeros(nbytes, dtype=torch.uint8)
        engine.submit(link, source, torch.zeros_like(source), kind=kind).synchronize()
    engine.close()
    assert engine.counters[IN].bytes == {"kv": 15, "weights": 20}
    assert engine.counters[OUT].bytes == {"kv": 7}
    assert {link: c.total_bytes for link, c in engine.counters.items()} == {
        Link.DISK_TO_HOST: 0,
        IN: 35,
        OUT: 7,
        Link.HOST_TO_DISK: 0,
    }
    assert (engine.counters[IN].transfers, engine.counters[OUT].transfers) == (3, 1)


def test_close_finishes_what_is_queued():
    """After close every submitted copy is over and no thread is left."""
    before = set(threading.enumerate())
    engine = TransferEngine(EmulatedBackend(MemoryAccount(), EmulatedMachine()))
    assert len(set(threading.enumerate()) - before) == 2 * 4
    transfers = [send(engine, IN, number) for number in range(50)]
    engine.close()
    assert all(transfer.issued for transfer in transfers)
    assert set(threading.enumerate()) - before == set()


def test_everything_that_can_be_moved(tmp_path):
    """Memory to file and back, rows of a file and of a tensor, and rows into pages."""
    backend = CpuBackend(MemoryAccount())
    engine = TransferEngine(backend)
    file = DirectFile.create(tmp_path / "file", 8192)
    extent = FileExtent(file, 4096, 60)
    table = torch.arange(60, dtype=torch.uint8)
    engine.submit(Link.HOST_TO_DISK, table, extent, kind="x").synchronize()
    back = torch.zeros(60, dtype=torch.uint8)
    engine.submit(backend.disk_in, extent, back, kind="x").synchronize()
    assert torch.equal(back, table)
    indices = torch.tensor([4, 0, 4])
    for source in (FileRows(extent, 10, indices), TensorRows(table.view(6, 10), indices)):
        rows = torch.zeros(3, 10, dtype=torch.uint8)
        engine.submit(backend.disk_in, source, rows, kind="x").synchronize()
        assert torch.equal(rows, table.view(6, 10)[indices])
        assert source.nbytes == 30
    for dims in ((3, 2), (3, 3)):
        shape = SimpleNamespace(kv_heads=2, key_dim=dims[0], value_dim=dims[1])
        pool = PagedKV.of(torch.zeros(5 * KVFormat(torch.float32).page(shape, 2)), shape, 2)
        slots = PageSlots(pool, TokenSlots(torch.tensor([4, 0]), torch.tensor([1, 0])))
        keys, values = (torch.rand(2, 2, dim) + 1 for dim in dims)
        packed = pool.pack(keys, values)
        engine.submit(backend.disk_in, packed, slots, kind="x").synchronize()
        for row, (page, offset) in enumerate([(4, 1), (0, 0)]):
            assert torch.equal(pool.keys[page, :, offset], keys[row])
            assert torch.equal(pool.values[page, :, offset], values[row])
        assert int((pool.raw != 0).sum()) == packed.numel()
    engine.close()
    file.close()


def numbers(nbytes: int) -> torch.Tensor:
    """A page-aligned pattern that differs from one request to the next."""
    tensor = map_memory(nbytes)
    tensor.copy_(torch.arange(nbytes) % 251)
    return tensor


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "over-host"])
def test_large_extents_come_from_disk_whole(tmp_path, unified):
    """Reads of many requests, through few staging buffers where HOST lies between, are complete."""
    account = MemoryAccount()
    backend = CpuBackend(account) if unified else EmulatedBackend(account, EmulatedMachine())
    engine = TransferEngine(backend)
    engine.use_staging(StagingBuffers([map_memory(REQUEST_BYTES) for _ in range(3)], backend))
    pattern = numbers(11 * REQUEST_BYTES + 4096)
    file = DirectFile.create(tmp_path / "file", pattern.nbytes)
    extent = FileExtent(file, 0, pattern.nbytes)
    engine.submit(Link.HOST_TO_DISK, pattern, extent, kind="x").synchronize()
    targets = [map_memory(pattern.nbytes) for _ in range(2)]
    reads = [
        engine.submit_from_disk([(extent, target)], kind="weights", padding=96, priority=priority)
        for target, priority in zip(targets, (9, 1))
    ]
    for read, target in zip(reads, targets):
        read.synchronize()
        assert torch.equal(target, pattern)
    links = [backend.disk_in] if unified else [READ, IN]
    for link in links:
        expected = {"weights": 2 * (pattern.nbytes - 96), "padding": 2 * 96}
        assert engine.counters[link].bytes == expected
        assert engine.timeline.busy_seconds(str(link)) > 0
    engine.close()
    file.close()


class FailingReads(EmulatedBackend):
    """Its disk fails at the fourth request."""

    reads = 0

    def copy(self, link: Link, source: Any, target: Any, after: Any, **how: Any) -> Any:
        if link is READ:
            self.reads += 1
            if self.reads == 4:
                raise OffloadStoreError("the link is broken")
        return super().copy(link, source, target, after, **how)


def test_a_read_that_fails_half_way_ends_the_transfer(tmp_path):
    """The error reaches the waiter, buffers are given back, and later transfers run."""
    backend = FailingReads(MemoryAccount(), EmulatedMachine())
    engine = TransferEngine(backend)
    engine.use_staging(StagingBuffers([map_memory(REQUEST_BYTES) for _ in range(2)], backend))
    nbytes = 9 * REQUEST_BYTES
    file = DirectFile.create(tmp_path / "file", nbytes)
    for error in (True, False):
        target = map_memory(nbytes)
        read = engine.submit_from_disk([(FileExtent(file, 0, nbytes), target)], kind="weights")
        if error:
            with pytest.raises(OffloadStoreError, match="the link is broken"):
                read.synchronize()
        else:
            read.synchronize()
    engine.close()
    file.close()


@pytest.mark.parametrize("lazy", [True, False])
def test_allocations_are_charged(lazy):
    """Memory is charged when it is allocated and refunded when it is freed; a reserve is not."""
    account = MemoryAccount({Tier.DEVICE: 1000})
    backend = CpuBackend(account)
    if lazy:
        assert backend.reserve(600).nbytes == 600
        assert account.used[Tier.DEVICE] == 0
    else:
        home = backend.allocate(Tier.DEVICE, 600, "weights")
        assert account.used[Tier.DEVICE] == 600
        backend.free(Tier.DEVICE, home)
        assert account.used[Tier.DEVICE] == 0


class NotesUrgency(EmulatedBackend):
    """Keeps which link was asked to copy urgently."""

    def __init__(self) -> None:
        super().__init__(MemoryAccount(), EmulatedMachine())
        self.asked: list[tuple[Link, bool]] = []

    def copy(self, link: Link, *arguments: Any, urgent: bool = False) -> Any:
        self.asked.append((link, urgent))
        return super().copy(link, *arguments, urgent=urgent)


@pytest.mark.parametrize("priority", [URGENT, 1])
def test_urgency_reaches_the_device(tmp_path, priority):
    """What compute waits for is urgent on both links from disk to the device; weights on none."""
    backend = NotesUrgency()
    engine = TransferEngine(backend)
    engine.use_staging(StagingBuffers([map_memory(REQUEST_BYTES) for _ in range(2)], backend))
    file = DirectFile.create(tmp_path / "file", 4096)
    copies = [(FileExtent(file, 0, 4096), map_memory(4096))]
    engine.submit_from_disk(copies, kind="kv", priority=priority).synchronize()
    assert backend.asked == [(READ, priority == URGENT), (IN, priority == URGENT)]
    engine.close()
    file.close()


class BusyDevice(EmulatedBackend):
    """Takes what is not urgent only once its gate is open, as a GPU that computes would."""

    blocking_links = (READ, IN)

    def __init__(self) -> None:
        super().__init__(MemoryAccount(), EmulatedMachine())
        self.gate = threading.Event()

    def copy(self, link: Link, *arguments: Any, urgent: bool = False) -> Any:
        if link is IN and not urgent:
            assert self.gate.wait(60)
        return super().copy(link, *arguments, urgent=urgent)


def test_what_is_urgent_passes_what_waits_for_the_device(tmp_path):
    """Weights that wait for a place on the device hold up neither threads nor staging for KV."""
    backend = BusyDevice()
    engine = TransferEngine(backend)
    engine.use_staging(StagingBuffers([map_memory(4096) for _ in range(8)], backend))
    file = DirectFile.create(tmp_path / "file", 16 * 4096)
    lazy = [
        engine.submit_from_disk([(FileExtent(file, 0, 16 * 4096), map_memory(16 * 4096))], kind="w")
        for _ in range(2)
    ]
    while engine.counters[READ].total_bytes < (8 - KEPT) * 4096:
        time.sleep(0.001)  # until no more buffers are to be had
    page = map_memory(4096)
    for _ in range(3):
        copies = [(FileExtent(file, 0, 4096), page)]
        engine.submit_from_disk(copies, kind="kv", priority=URGENT).synchronize()
        engine.submit(IN, page, map_memory(4096), kind="kv", priority=URGENT).synchronize()
    assert not any(transfer.issued for transfer in lazy)
    backend.gate.set()
    engine.close()
    assert all(transfer.issued for transfer in lazy)
    file.close()
