"""Facts about activations that wait on HOST: they come back unchanged, and leave room meanwhile."""

from __future__ import annotations

import random
import time

import pytest
import torch

from offload.activations import MOST_LEAVING, ActivationStore
from offload.backend import DeviceBackend
from offload.backend_cpu import CpuBackend
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.links import Link
from offload.tiers import MemoryAccount, Split, Tier
from offload.transfer_engine import TransferEngine
from tests.backends import GatedBackend

ROW = 12 * 4


class Rig:
    """A store with room for `rows` rows of 12 float32 values."""

    def __init__(self, split: str, rows: int, backend: DeviceBackend | None = None) -> None:
        self.backend = backend or EmulatedBackend(MemoryAccount(), EmulatedMachine())
        self.engine = TransferEngine(self.backend)
        self.store = ActivationStore(Split.parse(split), rows, ROW, self.backend, self.engine)

    def moved(self, link: Link) -> int:
        self.engine.drain()
        return self.engine.counters[link].bytes.get("activations", 0)

    def close(self) -> None:
        self.engine.close()
        self.store.close()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("split", ["host=100", "device=50,host=50", "device=80,host=20"])
def test_what_waits_comes_back_unchanged(seed, split):
    """Over many layers, with all references to the hidden states kept, values are the same."""
    draw = random.Random(seed)
    rows = [draw.randint(1, 9) for _ in range(draw.randint(2, 7))]
    rig = Rig(split, sum(rows))
    rig.store.begin(rows)
    values = [torch.randn(1, count, 12) for count in rows]
    hidden = [value.clone() for value in values]
    held = [each[0] for each in hidden]
    for number, each in enumerate(hidden):
        rig.store.store(number, each)
    for _ in range(5):
        for number in range(len(rows)):
            rig.store.fetch(number)
            rig.store.arrive(number)
            assert torch.equal(hidden[number], values[number])
            assert torch.equal(held[number], values[number][0])
            hidden[number].mul_(2)
            values[number].mul_(2)
            rig.store.store(number, hidden[number])
    rig.store.end()
    rig.close()
    assert set(rig.backend.account.used.values()) == {0}


def test_what_waits_takes_no_device_memory():
    """Once hidden states are on HOST, their storage is empty; few are on their way at once."""
    rig = Rig("host=100", 50)
    rig.store.begin([10] * 5)
    hidden = [torch.randn(10, 12) for _ in range(5)]
    for number, each in enumerate(hidden):
        rig.store.store(number, each)
        full = [tensor for tensor in hidden[: number + 1] if tensor.untyped_storage().nbytes()]
        assert len(full) <= MOST_LEAVING
    rig.engine.drain()
    rig.store.fetch(4)  # the newest; everything before it has left
    assert [tensor.untyped_storage().nbytes() for tensor in hidden[:4]] == [0] * 4
    assert rig.moved(Link.DEVICE_TO_HOST) == 5 * 10 * ROW
    assert rig.backend.account.used[Tier.HOST] == 50 * ROW
    rig.store.end()
    rig.close()


@pytest.mark.parametrize(("share", "expected"), [(0, 0), (25, 2), (50, 4), (100, 8)])
def test_the_split_says_how_many_wait_on_host(share, expected):
    """Of eight equal micro-batches, the share's number goes to HOST."""
    rig = Rig(f"device={100 - share},host={share}", 80)
    rig.store.begin([10] * 8)
    for number in range(8):
        rig.store.store(number, torch.randn(10, 12))
    assert rig.moved(Link.DEVICE_TO_HOST) == expected * 10 * ROW
    rig.store.end()
    rig.close()


@pytest.mark.parametrize("case", ["alone", "cpu", "view"])
def test_what_cannot_or_need_not_leave_stays(case):
    """A lone micro-batch never waits, a CPU's HOST is its DEVICE, and a part of a tensor stays."""
    backend = CpuBackend(MemoryAccount()) if case == "cpu" else None
    rig = Rig("host=100", 20, backend)
    rig.store.begin([10] if case == "alone" else [10, 10])
    hidden = torch.randn(11, 12)[1:] if case == "view" else torch.randn(10, 12)
    assert rig.store.store(0, hidden) is None
    assert rig.store.fetch(0) is None
    rig.store.arrive(0)
    assert rig.moved(rig.backend.links[0]) == 0
    rig.close()


def test_what_left_late_spoils_no_later_sweep():
    """A copy that nobody waited for, still on its way in the next sweep, keeps the order there."""
    backend = GatedBackend(Link.DEVICE_TO_HOST, held=0)
    rig = Rig("host=100", 20, backend)
    rig.store.begin([10, 10])
    rig.store.store(0, torch.zeros(10, 12))
    rig.store.fetch(0)  # it is still there
    rig.store.end()
    rig.store.begin([5, 15])  # now the second micro-batch's place overlaps that of the first
    hidden, value = (torch.ones(15, 12) for _ in range(2))
    out = rig.store.store(1, hidden)
    assert out is not None
    time.sleep(0.2)
    assert not out.issued
    backend.gate.set()
    rig.engine.drain()
    rig.store.fetch(1)
    rig.store.arrive(1)
    assert rig.moved(Link.HOST_TO_DEVICE) == 15 * ROW
    assert torch.equal(hidden, value)
    rig.store.end()
    rig.close()
